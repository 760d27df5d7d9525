"""One process may run stages of several precisions, one after the other."""

from latentgen.training.precision import accelerator_for


def test_a_run_after_another_has_its_own_precision() -> None:
    assert [accelerator_for(asked).mixed_precision for asked in ("fp32", "bf16", "fp32")] == ["no", "bf16", "no"]
