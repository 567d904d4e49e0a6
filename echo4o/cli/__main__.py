"""python -m echo4o.cli VERB, as torchrun starts it."""

from echo4o.cli import main

if __name__ == "__main__":
    main()
