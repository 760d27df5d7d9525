"""What a render opens of its weights, begun while the program that renders is still being imported.

Importing keeps one core for a third of the time from a shell to a picture. Opening what is ready, and comparing the
weights' hashes, keeps another for as long, and asks for NumPy and ONNX Runtime alone.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latentgen.checkpoint import default_weights, open_checkpoint
from latentgen.durable import user_cache
from latentgen.errors import InputError
from latentgen.models.onnx.places import cache_folder, find_graphs, speaks_for_gpu

THREADS = 4


def open_ahead(weights: str | Path | None, tokenizer: str | Path | None = None) -> None:
    """Begin to open a checkpoint on this CPU, in the background, for a pipeline that `open_engine` opens afterwards.

    Only what is on this disk and ready: nothing is fetched, exported or made here. What is wrong is said by who opens.
    """
    if speaks_for_gpu() or not (user_cache() / "onnx" / "ready").is_dir():
        return
    try:
        place = default_weights() if weights is None else Path(weights).expanduser()
        if not place.exists():
            return
        checkpoint = open_checkpoint(place, tokenizer=tokenizer, verify=False)
    except (InputError, OSError):
        return
    pool = ThreadPoolExecutor(THREADS)
    pool.submit(checkpoint.verify)
    from latentgen.models.onnx import session

    try:
        second = checkpoint.has_second
        graphs = find_graphs(checkpoint.folder, second) or find_graphs(cache_folder(checkpoint), second)
        for name, graph in (graphs or {}).items():
            part = "unet" if graph.parent.name == "unet" else name
            session.begin_session(pool, checkpoint, part, graph, session.cores())
    except (InputError, OSError):
        return
    finally:
        pool.shutdown(wait=False)
