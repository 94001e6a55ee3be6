"""Try every pipeline, or those that are named, and write docs/pipelines.md."""

import sys

from zoo.accounts import exported
from zoo.table import PAGE, Row, read, row, write


def main(wanted: list[str]) -> None:
    rows = read() if PAGE.exists() else {}
    for name in wanted or exported():
        sys.stderr.write(f"{name}\n")
        try:
            rows[name] = row(name)
        except Exception as error:
            rows[name] = Row(name, note=f"not built: {type(error).__name__}")
        write({name: rows[name] for name in exported() if name in rows})
    write({name: rows[name] for name in exported() if name in rows})


if __name__ == "__main__":
    main(sys.argv[1:])
