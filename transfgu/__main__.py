"""`python -m transfgu` is the command `transfgu`."""

from transfgu.cli.main import main

if __name__ == "__main__":
    main()
