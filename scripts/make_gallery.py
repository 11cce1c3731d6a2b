"""Take pictures of the pages and curves of the quickstarts for docs/gallery.md, in light and dark.

    make pipeline
    python scripts/make_gallery.py [RUNS]

needs Debian's chromium. RUNS is the folder of the runs, `runs` by default; what is not there is left as it is.
"""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "gallery"
TUNER = [sys.executable, "-m", "tuner"]
WIDTH = 1200
SCHEMES = {"light": "1", "dark": "0"}
"""Name of a color scheme -> chromium's number of it."""


def write_compact(png: bytes, path: Path) -> None:
    """Write a picture with 128 colors, which flat pages and curves do not exceed visibly, at most WIDTH wide."""
    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize(
            (WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS
        )
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1024} KiB")


def photograph(address: str, name: str, height: int) -> None:
    """Pictures of a page's first `height` pixels, one in each color scheme."""
    for scheme, number in SCHEMES.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "page.png"
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            flags += [f"--window-size={WIDTH},{height}", f"--blink-settings=preferredColorScheme={number}"]
            subprocess.run(
                ["chromium", *flags, f"--screenshot={file}", address],
                check=True,
                capture_output=True,
                timeout=120,
            )
            write_compact(file.read_bytes(), PICTURES / f"{name}_{scheme}.png")


def pages(runs: Path, folder: Path) -> dict[str, tuple[Path, int]]:
    """Name of a page -> its file and the height of its picture; what a command writes is written into a folder."""
    written = {
        "tokens": ["data", "quickstart_sft", "--html"],
        "win_rates": [
            "eval",
            runs / "quickstart_ppo",
            "--against",
            runs / "quickstart_sft",
            "--trust",
            "--html",
        ],
    }
    for name, command in written.items():
        if all(path.is_dir() for path in command if isinstance(path, Path)):
            subprocess.run(
                [*TUNER, *map(str, command), str(folder / f"{name}.html")], check=True, capture_output=True
            )
    return {
        "tokens": (folder / "tokens.html", 620),
        "report_card": (runs / "quickstart_reward" / "report.html", 1100),
        "win_rates": (folder / "win_rates.html", 1300),
        "rounds": (runs / "quickstart_cool" / "rounds.html", 1500),
    }


def photograph_labels(run: Path, folder: Path) -> None:
    """Pictures of the page that `tuner label` opens, with a store that is thrown away."""
    command = [
        *TUNER,
        "label",
        str(run),
        "--name",
        "ann",
        "--port",
        "0",
        "--store",
        str(folder / "labels.sqlite"),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        address = next(
            word for line in server.stdout for word in line.split() if word.startswith("http://127.0.0.1")
        )
        photograph(address, "labels", 700)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs").resolve()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name, (page, height) in pages(runs, Path(temporary)).items():
            if page.is_file():
                photograph(page.as_uri(), name, height)
        if (runs / "quickstart_cool" / "round_1" / "candidates").is_dir():
            photograph_labels(runs / "quickstart_cool", Path(temporary))


if __name__ == "__main__":
    main()
