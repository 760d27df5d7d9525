"""`latentgen`, and `python -m latentgen`: the command line."""

from latentgen.stopping import stop_at_once


def main() -> None:
    """The command, which Ctrl-C ends from its first moment on."""
    stop_at_once()
    from latentgen.cli import main as run

    run()


if __name__ == "__main__":
    main()
