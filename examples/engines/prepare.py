"""Trains a teacher, and a student up to its warm-up, with the quick start's recipe, and writes them as
Hugging Face folders for engines.

Heads are 32 wide here, the narrowest that vLLM's attention on a CPU computes. The folders also contain the
tokenizers' files under the names that vLLM expects.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from examples.quickstart.run import ARCHITECTURE, ROOT, Recipe
from examples.quickstart.run import parse as parse_quickstart
from examples.stages import Stage
from megatron_simct.config.command_line import command
from megatron_simct.files import write_whole
from megatron_simct.models.tensor_files import EMBEDDING, HEAD, INDEX

TOKENIZERS = {
    "teacher": {"mistral_v3.model": "tokenizer.model.v3"},
    "student": {"tekken_32768.json": "tekken.json"},
}


def stages(recipe: Recipe, folder: Path) -> list[Stage]:
    """The training of both models, then the export of their weights as Hugging Face folders."""
    convert = str(ROOT / "tools" / "convert_checkpoint.py")
    exports = []
    for name, trained in (("teacher", recipe.teacher), ("student", recipe.student)):
        output = folder / f"{name}-hf"
        words = ["megatron-to-hf", "--load", str(trained.output / "checkpoint"), "--save", str(output)]
        words += ["--hf-checkpoint", str(folder / f"{name}-architecture")]
        exports.append(
            Stage(
                name=f"export the {name}",
                command=(sys.executable, convert, *words),
                output=output,
                needs=(trained,),
            )
        )
    return [*recipe.warm_start, *exports]


def untie(folder: Path) -> None:
    """Give the model a separate LM head: vLLM on a CPU does not notice a change of a head that is
    tied to the embedding.
    """
    config, index = folder / "config.json", folder / INDEX
    fields = json.loads(config.read_text())
    if not fields["tie_word_embeddings"]:
        return
    listed = json.loads(index.read_text())
    path = folder / listed["weight_map"][EMBEDDING]
    tensors = load_file(path)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    listed["weight_map"][HEAD] = path.name
    save_file(tensors, path, metadata={"format": "pt"})
    write_whole(index, json.dumps(listed))
    write_whole(config, json.dumps(fields | {"tie_word_embeddings": False}))


@command("examples/engines/prepare.sh")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples/engines/prepare.sh", description=__doc__)
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=ROOT / "runs" / "engines" / "models",
        help="folder for the models and all other files",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="two steps each, as a test that it runs; nothing is learned"
    )
    options = parser.parse_args(argv)
    folder = options.run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--run-dir", str(folder), *(["--smoke"] if options.smoke else [])]
    recipe = Recipe(parse_quickstart(flags), folder, architecture=ARCHITECTURE | {"num_attention_heads": 3})
    for stage in stages(recipe, folder):
        stage.run(ROOT)
    untie(folder / "student-hf")
    for name, files in TOKENIZERS.items():
        for source, known_as in files.items():
            shutil.copyfile(folder / "tokenizers" / source, folder / f"{name}-hf" / known_as)
    with (folder / "train.jsonl").open() as rows:  # the teacher knows only answers of this kind
        (folder / "probe.txt").write_text(json.loads(next(rows))["response"])


if __name__ == "__main__":
    sys.exit(main())
