"""``glance-ext`` and ``python -m glance_ext``: the command line."""

import signal


def main() -> None:
    """Runs the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # While this is Python's, Ctrl-C prints a traceback of whatever is being imported. The
        # command line sets a handler of its own as soon as it is there.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from glance_ext.cli import main as run

    run(prog_name="glance-ext")


if __name__ == "__main__":
    main()
