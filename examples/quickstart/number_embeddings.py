"""Random weights in which the vector of a number token is the sum of one vector for each (position, digit).

A model that reads "82" as one token must learn every number separately. A small one memorises sums instead of
adding. Sums of digit vectors tell it which numbers are neighbours, as a long pre-training would. They are
used only for the tokenizer that groups digits.
"""

from __future__ import annotations

import argparse

import torch

from megatron_simct.alignment import load_tokenizer
from megatron_simct.config.flags import parse_config
from megatron_simct.loading import load_model
from megatron_simct.parallel.initialize import process_groups
from megatron_simct.update.checkpoint import save_weights


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-checkpoint", required=True, help="folder with config.json")
    parser.add_argument("--tokenizer-model", required=True, help="tokenizer file")
    parser.add_argument("--save", required=True, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--std", type=float, default=0.05, help="standard deviation of the digit vectors")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer_model)
    config = parse_config(
        [
            "--hf-checkpoint",
            options.hf_checkpoint,
            "--tokenizer-model",
            options.tokenizer_model,
            "--seed",
            str(options.seed),
        ]
    )
    with process_groups(config.parallel, seed=options.seed) as groups:
        model = load_model(config, config.model, groups, tokenizer, prefix="")
        weight = model.output_weight
        vectors = options.std * torch.randn(3, 10, weight.shape[1])
        for token_id, piece in enumerate(tokenizer.table.pieces()):
            if piece.isdigit():
                weight[token_id] = sum(
                    vectors[k, digit - ord("0")] for k, digit in enumerate(reversed(piece))
                )
        save_weights(model, options.save, 0)


if __name__ == "__main__":
    main()
