"""The fourth hop: the student's hidden states and the teacher's word, compared on vocabulary shards."""

from megatron_simct.losses.bytes import ByteOrder
from megatron_simct.losses.interfaces import LabelRows, LossOutput, interface_loss, interface_loss_from_logits
from megatron_simct.losses.needs import check_config, check_labels, known_failure, teacher_needs
from megatron_simct.losses.public import (
    CrossTokenizerLoss,
    cross_tokenizer_loss,
    fused_cross_tokenizer_loss,
    place_shared_head,
)
from megatron_simct.losses.shared_head import SharedColumns, SharedHead, gather_shared_head
from megatron_simct.losses.vocab_parallel import label_statistics, logit_statistics

__all__ = [
    "ByteOrder",
    "CrossTokenizerLoss",
    "LabelRows",
    "LossOutput",
    "SharedColumns",
    "SharedHead",
    "check_config",
    "check_labels",
    "cross_tokenizer_loss",
    "fused_cross_tokenizer_loss",
    "gather_shared_head",
    "interface_loss",
    "interface_loss_from_logits",
    "known_failure",
    "label_statistics",
    "logit_statistics",
    "place_shared_head",
    "teacher_needs",
]
