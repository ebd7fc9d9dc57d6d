"""``python -m glance_ext.cli``, which ``torchrun -m`` starts too."""

from glance_ext.cli import main

if __name__ == "__main__":
    main(prog_name="glance-ext")
