"""``python -m portmoe``: the same as the ``portmoe`` command."""

from portmoe.cli.main import main

if __name__ == "__main__":
    main()
