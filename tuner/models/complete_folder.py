"""A folder with a model's complete weights, whether they are there already or must be merged first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tuner import config
from tuner.models.internlm2 import MODEL_TYPE
from tuner.models.load import Precision
from tuner.models.locate import locate
from tuner.models.merge import MergeReport, export, merge
from tuner.models.model_file import read_model_file
from tuner.models.save import disk_errors


@contextmanager
def complete_folder(
    run_or_model_folder: str,
    output: Path,
    *,
    dtype: Precision,
    texts: Callable[[], Sequence[str]],
    say: Callable[[MergeReport], None],
    trust: bool = False,
    as_llama: bool = False,
) -> Iterator[Path]:
    """The folder of a model without an adapter, or one beside `output` that its adapter is merged in, until the end.

    dtype, texts: of a merge, as in `merge`. say: takes its report. as_llama: InternLM2 in the layout of Llama, for
    tools that do not know it. Raises UserError as `merge` does.
    """
    location = locate(config.Model(path=run_or_model_folder, trust_remote_code=trust))
    layout = "llama" if as_llama and read_model_file(location.base_folder).model_type == MODEL_TYPE else "own"
    if location.adapter_folder is None and layout == "own":
        yield location.base_folder
        return
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # not in /tmp: a model may be larger than memory, which that may be
        temporary = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-")
    with temporary as folder:
        merged = Path(folder, "merged")
        if location.adapter_folder is None:
            export(run_or_model_folder, merged, dtype=dtype, layout=layout, trust=trust)
        else:
            say(merge(run_or_model_folder, merged, dtype=dtype, texts=texts(), layout=layout, trust=trust))
        yield merged
