"""From sampled tokens to common units: which labels of two tokenizations of one response can be compared.

Reading order, each file one idea on top of the previous:
    token_table.py    what every id of a tokenizer means in bytes
    tokenizer.py      a table plus "encode these bytes"
    hf_folder.py        the files of a Hugging Face folder beside its tokenizer
    folder_tokens.py    these compared with the vocabulary: one id for each token, stop ids
    hf_tokenizer.py, tokenizer_files.py   the tokenizer's own file; all by `load_tokenizer`
    segments.py       two tokenizations of one byte string, cut into minimal common units
    continuations.py    which byte may follow a token in a tokenizer's own cut
    cut_rules.py      that table of a tokenizer, from its merges, pretokens and groups of digits
    byte_bounds.py    known and unresolved mass of the next byte, of two models
    byte_events.py    the same for tokenizers that take the longest match
    languages.py      small languages whose models are known exactly, in any tokenizer
    alignment_map.py  the shared vocabulary: pairs of ids that mean the same bytes
    map_files.py      that vocabulary as a folder
    coverage.py       how much of a text it covers
    placement.py      that vocabulary on one vocabulary shard, as the loss reads it
    plan.py           one rollout in, one AlignedPair out
Nothing here runs a model, so all of it can run on CPU workers while models are busy.
"""

from megatron_simct.alignment.alignment_map import AlignmentMap, build_alignment_map
from megatron_simct.alignment.placement import VocabPlacement
from megatron_simct.alignment.plan import plan_pair
from megatron_simct.alignment.segments import Alignment, align, align_batch
from megatron_simct.alignment.token_table import TokenTable
from megatron_simct.alignment.tokenizer import Tokenizer, report_notes
from megatron_simct.alignment.tokenizer_files import load_tokenizer

__all__ = [
    "Alignment",
    "AlignmentMap",
    "TokenTable",
    "Tokenizer",
    "VocabPlacement",
    "align",
    "align_batch",
    "build_alignment_map",
    "load_tokenizer",
    "plan_pair",
    "report_notes",
]
