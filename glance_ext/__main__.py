"""``python -m glance_ext``: the command line."""

from glance_ext.cli import main

if __name__ == "__main__":
    main(prog_name="glance-ext")
