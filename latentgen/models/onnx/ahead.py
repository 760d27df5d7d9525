"""What a render opens of its weights, begun while the program that renders is still being imported.

Importing keeps one core for a third of the time from a shell to a picture. Opening what is ready, and comparing the
weights' hashes, keeps another for as long, and asks for NumPy and ONNX Runtime alone.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from latentgen.checkpoint import default_weights, open_checkpoint
from latentgen.durable import MANIFEST, user_cache
from latentgen.errors import InputError
from latentgen.models.onnx.places import TOLD, cache_folder, find_graphs, speaks_for_gpu

THREADS = 4
SMALL = 512 << 20  # bytes of weights: of more, imports are little beside, and a mistake would wait for them to be read


def open_ahead(weights: str | Path | None, tokenizer: str | Path | None = None) -> None:
    """Begin to open a checkpoint on this CPU, in the background, for a pipeline that `open_engine` opens afterwards.

    Only what is on this disk, small, with a manifest that tells its hashes, and ready: nothing is fetched, exported or
    made here. What is wrong is said by who opens.
    """
    with suppress(InputError, OSError, RuntimeError, ImportError):  # no home folder; no ONNX Runtime
        place = default_weights() if weights is None else Path(weights).expanduser()
        if speaks_for_gpu() or not ((place / MANIFEST).is_file() and (user_cache() / "onnx" / "ready").is_dir()):
            return
        checkpoint = open_checkpoint(place, tokenizer=tokenizer, verify=False)
        if sum(path.stat().st_size for paths in checkpoint.weights.values() for path in paths) > SMALL:
            return
        second = checkpoint.has_second
        graphs = find_graphs(place, second) or find_graphs(cache_folder(checkpoint), second) or {}
        pool = ThreadPoolExecutor(THREADS)
        pool.submit(checkpoint.verify)
        from latentgen.models.onnx import session

        for name, graph in graphs.items():
            part = "unet" if name == TOLD else name
            session.begin_session(pool, checkpoint, part, graph, session.cores())
        pool.shutdown(wait=False)
