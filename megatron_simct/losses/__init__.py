"""The fourth hop: compares the student's hidden states with the teacher's scores on vocabulary shards."""

from megatron_simct.losses.checks import (
    check_comparisons,
    check_config,
    check_has_units,
    check_labels,
    comparisons,
    known_failure,
    mixable,
    teacher_needs,
)
from megatron_simct.losses.kinds.bytes import ByteOrder
from megatron_simct.losses.loss import LabelRows, LossOutput, interface_loss, interface_loss_from_logits
from megatron_simct.losses.public import (
    CrossTokenizerLoss,
    Head,
    Logits,
    Response,
    SharedVocabulary,
    cross_tokenizer_loss,
    place_shared_head,
)
from megatron_simct.losses.shared_head import SharedColumns, SharedHead, gather_shared_head
from megatron_simct.losses.vocab_parallel import label_statistics, logit_statistics

__all__ = [
    "ByteOrder",
    "CrossTokenizerLoss",
    "Head",
    "LabelRows",
    "Logits",
    "LossOutput",
    "Response",
    "SharedColumns",
    "SharedHead",
    "SharedVocabulary",
    "check_comparisons",
    "check_config",
    "check_has_units",
    "check_labels",
    "comparisons",
    "cross_tokenizer_loss",
    "gather_shared_head",
    "interface_loss",
    "interface_loss_from_logits",
    "known_failure",
    "label_statistics",
    "logit_statistics",
    "mixable",
    "place_shared_head",
    "teacher_needs",
]
