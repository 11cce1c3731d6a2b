"""Import every config of a folder, as those of XTuner, LLaMA-Factory and Axolotl ship, and count what becomes of them.

    python scripts/try_imports.py xtuner/xtuner/configs

Each imported file is written to a temporary folder, loaded, and compared with the config that was reported. The figures
of docs/importing.md are this script's.
"""

import argparse
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

from tuner.config import load_config
from tuner.errors import UserError
from tuner.importers.import_file import import_config

SUFFIXES = (".py", ".yaml", ".yml")


def try_all(folder: Path) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """(imported configs by class, reasons of refusals, keys that were lost), each counted."""
    imported, refused, lost = Counter[str](), Counter[str](), Counter[str]()
    for number, file in enumerate(sorted(folder.rglob("*"))):
        if file.suffix not in SUFFIXES or file.name == "__init__.py":
            continue
        target = Path(f"imported_{number}.py")
        try:
            result = import_config(file, target)
        except UserError as error:
            reason = re.sub(r":\d+", "", str(error).replace(str(file), "")).strip(": ")
            refused[re.sub(r"\.\d+\.", ".N.", reason)] += 1
            continue
        for path, text in {str(target): result.text, **result.templates}.items():
            Path(path).write_text(text, encoding="utf-8")
        loaded = load_config(target).model_copy(update={"name": None})
        assert loaded == result.config, f"{file}: the written file loads as another config"
        imported[type(loaded).__name__] += 1
        lost.update(re.sub(r"\.\d+(?=\.|$)", ".N", key) for key in result.report.lost)
    return imported, refused, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        imported, refused, lost = try_all(folder)
    print(f"imported: {imported.total()}, {dict(imported)}; refused: {refused.total()}")
    for title, counts in (("refused", refused), ("keys that were lost", lost)):
        print(f"{title}:")
        for text, count in counts.most_common():
            print(f"{count:5} {text}")


if __name__ == "__main__":
    main()
