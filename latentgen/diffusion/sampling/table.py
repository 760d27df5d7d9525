"""What each sampler is, where it is from, how fast it converges, and when to choose it: what people are shown."""

from typing import NamedTuple


class SamplerNote(NamedTuple):
    """One row of the table. `order` is in the step size, as measured; `evaluations` is network calls a step."""

    name: str
    what: str
    source: str
    order: str
    evaluations: str
    random: bool
    when: str


TABLE: tuple[SamplerNote, ...] = (
    SamplerNote(
        "dpmpp-2m",
        "DPM-Solver++ multistep, exponential integrator in logSNR",
        "Lu et al. 2022, arXiv 2211.01095",
        "2",
        "1",
        False,
        "the default choice: good pictures in 15 to 30 steps",
    ),
    SamplerNote(
        "unipc",
        "predictor and corrector of any order, multistep",
        "Zhao et al. 2023, arXiv 2302.04867",
        "2 (3 with order=3)",
        "1",
        False,
        "the fewest steps: 8 to 15",
    ),
    SamplerNote(
        "deis",
        "Adams–Bashforth with eps a polynomial in log sigma",
        "Zhang & Chen 2023, arXiv 2204.13902",
        "2 (3 with order=3)",
        "1",
        False,
        "few steps, as unipc; another taste of error",
    ),
    SamplerNote(
        "ddim",
        "the ODE's first-order step; eta adds DDPM's noise back",
        "Song, Meng & Ermon 2021, arXiv 2010.02502",
        "1",
        "1",
        False,
        "a baseline, inversion, and whenever simplicity matters; 30 to 100 steps",
    ),
    SamplerNote(
        "euler",
        "Euler's method in sigma/alpha; DDIM with its own spacing",
        "Karras et al. 2022, arXiv 2206.00364",
        "1",
        "1",
        False,
        "rectified-flow models, and checkpoints whose config says so",
    ),
    SamplerNote(
        "heun",
        "Heun's method: Euler, then both slopes averaged",
        "Karras et al. 2022, arXiv 2206.00364, algorithm 1",
        "2",
        "2",
        False,
        "a memoryless second-order reference; half as many steps for the same time",
    ),
    SamplerNote(
        "lms",
        "linear multistep in sigma/alpha, order 4",
        "k-diffusion; Adams–Bashforth",
        "about 3.7",
        "1",
        False,
        "many steps (40 and more), where its high order pays",
    ),
    SamplerNote(
        "plms",
        "pseudo linear multistep, order 4 after its first steps",
        "Liu et al. 2022, arXiv 2202.09778",
        "2",
        "1 (2 for the first)",
        False,
        "checkpoints with a PNDM config: Stable Diffusion 1's own default",
    ),
    SamplerNote(
        "pndm",
        "plms begun with three pseudo Runge–Kutta steps",
        "Liu et al. 2022, arXiv 2202.09778",
        "2",
        "1 (4 for the first three)",
        False,
        "DDPM checkpoints with a PNDM config",
    ),
    SamplerNote(
        "probability-flow",
        "Dormand–Prince 5(4), steps chosen to a tolerance",
        "Song et al. 2021, arXiv 2011.13456, section 4.3",
        "5",
        "6",
        False,
        "a reference solution, round trips and likelihoods",
    ),
    SamplerNote(
        "ddpm",
        "ancestral sampling; fixed-small, fixed-large or learned variance",
        "Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021",
        "1 (weak)",
        "1",
        True,
        "hundreds of steps; models with a learned variance",
    ),
    SamplerNote(
        "euler-ancestral",
        "an Euler step further down, then noise up again; DDIM with eta 1",
        "k-diffusion",
        "1 (weak)",
        "1",
        True,
        "varied, soft pictures in 20 to 40 steps",
    ),
    SamplerNote(
        "dpmpp-2m-sde",
        "SDE-DPM-Solver++ multistep, noise from a Brownian path",
        "Lu et al. 2022, arXiv 2211.01095, section 5",
        "2 in the drift",
        "1",
        True,
        "the stochastic choice: more texture than dpmpp-2m, same cost; more steps refine the same picture",
    ),
    SamplerNote(
        "dpmpp-sde",
        "DPM-Solver++ singlestep with ancestral noise from a Brownian path",
        "k-diffusion; Lu et al. 2022, arXiv 2206.00927",
        "2 in the drift",
        "2",
        True,
        "detail at 10 to 20 steps, at twice the cost a step",
    ),
    SamplerNote(
        "lcm",
        "to x0 in one step, then fresh noise",
        "Luo et al. 2023, arXiv 2310.04378",
        "none",
        "1",
        True,
        "latent consistency models only: 1 to 8 steps",
    ),
    SamplerNote(
        "predictor-corrector",
        "reverse-diffusion predictor, Langevin corrector",
        "Song et al. 2021, arXiv 2011.13456, algorithm 2",
        "1 (weak)",
        "2",
        True,
        "VE and score models; hundreds of steps",
    ),
    SamplerNote(
        "langevin",
        "annealed Langevin dynamics",
        "Song & Ermon 2019, arXiv 1907.05600, algorithm 1",
        "none",
        "5",
        True,
        "noise-conditional score networks, and to see what the score alone does",
    ),
)
