"""The tokenizer files that can be loaded.

Loaded, each by the library made for it (imported inside the loading function):
    tokenizer.json                Hugging Face tokenizers (hf_tokenizer.py); or the folder that holds it
    NAME.model, NAME.model.v3     SentencePiece
    NAME.tiktoken                 tiktoken ranks, beside NAME.tiktoken.json = {"pattern": regex,
                                  "special_tokens": {text: id}, "stop_tokens": [text]}
    tiktoken:NAME                 an encoding that tiktoken itself knows, such as o200k_base
    tekken*.json                  Mistral's ranks in JSON
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from megatron_simct.alignment.hf_folder import generation_stop_ids, tokenizer_file
from megatron_simct.alignment.hf_tokenizer import load_hf_tokenizer
from megatron_simct.alignment.tokenizer import Tokenizer, build_table, encode_cut

_ACCEPTED = (
    "accepted are a Hugging Face tokenizer.json or its folder, a SentencePiece model (NAME.model), tiktoken ranks "
    "(NAME.tiktoken with NAME.tiktoken.json beside it), tiktoken:NAME, and Mistral's tekken*.json"
)


def load_tokenizer(spec: str, stop_token_ids: Iterable[int] = (), *, allow_lossy: bool = False) -> Tokenizer:
    """Loads the tokenizer `spec`, a file or a Hugging Face folder; `stop_token_ids` replaces the stop tokens it names.

    The first stop id is the one that a retokenized response ends with, so give what the model emits to end its turn.
    Raises ValueError, naming the file, if it cannot be read, is of no accepted kind, has no stop token, or would not
    spell text as it is (a normalizer that rewrites text, WordPiece). With allow_lossy the last is not an error; what
    such a tokenizer changes is left out of every comparison, and `Tokenizer.lossy` has the reason.
    """
    if spec.startswith("tiktoken:"):
        return _load_tiktoken_encoding(spec, tuple(stop_token_ids))
    path = Path(spec)
    if not path.exists():
        raise ValueError(f'tokenizer "{spec}" does not exist; {_ACCEPTED}')
    in_folder = path.is_dir()
    if in_folder:
        path = tokenizer_file(path) or path / "tokenizer.json"
    if path.name == "tokenizer.json":
        load: Callable[..., Tokenizer] = load_hf_tokenizer
    elif re.search(r"\.model(\.\w+)?$", path.name):
        load = _load_sentencepiece
    elif path.suffix == ".tiktoken":
        load = _load_tiktoken
    elif re.fullmatch(r"tekken.*\.json", path.name):
        load = _load_tekken
    else:
        raise ValueError(f'tokenizer "{spec}" is of an unknown kind; {_ACCEPTED}')
    try:
        stop_ids = tuple(stop_token_ids)
        if in_folder and load is _load_sentencepiece:
            stop_ids = stop_ids or generation_stop_ids(path.parent)
        if load in (load_hf_tokenizer, _load_sentencepiece):
            return load(path, stop_ids, allow_lossy=allow_lossy)
        return load(path, stop_ids)
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f'tokenizer "{spec}" cannot be used: {type(error).__name__}: {error}; {_ACCEPTED}') from error


# A serialized protobuf message followed by another one is their merge, the later value of a field winning. So the
# normalizer of a SentencePiece model is changed by appending a ModelProto that holds only normalizer_spec (field 3):
# add_dummy_prefix (3) = false, remove_extra_whitespaces (4) = false; or precompiled_charsmap (2) = "".
_KEEP_BLANKS = bytes([0x1A, 4, 0x18, 0, 0x20, 0])
_NO_CHARSMAP = bytes([0x1A, 2, 0x12, 0])


def _load_sentencepiece(path: Path, stop_token_ids: tuple[int, ...], *, allow_lossy: bool) -> Tokenizer:
    import sentencepiece

    def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=model)

    model = path.read_bytes() + _KEEP_BLANKS
    sp = processor(model)
    # A character map takes hundreds of kilobytes, an empty field two bytes.
    charsmap_bytes = len(sp.serialized_model_proto()) - len(processor(model + _NO_CHARSMAP).serialized_model_proto())
    ids = range(sp.get_piece_size())
    pieces = [_piece_bytes(sp.id_to_piece(i), is_byte=sp.is_byte(i)) for i in ids]
    special_ids = {i for i in ids if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)}
    missing = set(range(256)) - {piece[0] for i, piece in enumerate(pieces) if len(piece) == 1 and i not in special_ids}
    lossy = None
    if charsmap_bytes > 2:
        lossy = (
            f"its normalizer rewrites text (a character map of {charsmap_bytes} bytes, as nmt_nfkc has), so its tokens "
            "would not spell the response; only identity normalizers are supported"
        )
    elif sp.normalize("  a  b ") != "▁▁a▁▁b▁":
        lossy = f'its normalizer turns "  a  b " into "{sp.normalize("  a  b ")}" instead of keeping blanks'
    elif missing:
        lossy = f"{len(missing)} single bytes have no token, {min(missing):#04x} first, so not every text has tokens"
    if lossy is not None and not allow_lossy:
        raise ValueError(lossy)

    stop_ids = stop_token_ids or ((sp.eos_id(),) if sp.eos_id() >= 0 else ())
    # Pieces of the kind USER_DEFINED are found in any text, and some models' stop tokens are of that kind. Cutting the
    # text behind the first character of such a piece keeps its spelling ordinary text.
    found = [sp.id_to_piece(i) for i in stop_ids if i in ids and i not in special_ids]
    cuts = re.compile("|".join(f"(?<={re.escape(piece[0])})(?={re.escape(piece[1:])})" for piece in found))
    return Tokenizer(
        name=str(path),
        table=build_table(pieces, special_ids, stop_ids, normalizer=lossy or ""),
        encode_text=partial(encode_cut, sp.encode, cuts) if found else sp.encode,
        bos_id=sp.bos_id() if sp.bos_id() >= 0 else None,
        lossy=lossy,
    )


def _piece_bytes(piece: str, *, is_byte: bool) -> bytes:
    """'▁' stands for a blank, a byte piece '<0x0A>' for that byte."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()


def _load_tiktoken(path: Path, stop_token_ids: tuple[int, ...]) -> Tokenizer:
    ranks = {}
    for line in path.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    sidecar = json.loads(path.with_name(path.name + ".json").read_text())
    special_tokens = sidecar["special_tokens"]
    stop_ids = stop_token_ids or tuple(special_tokens[text] for text in sidecar["stop_tokens"])
    return _from_ranks(path, ranks, sidecar["pattern"], special_tokens.values(), stop_ids, bos_id=None)


def _load_tiktoken_encoding(spec: str, stop_token_ids: tuple[int, ...]) -> Tokenizer:
    """tiktoken brings the ranks, over the network unless they are in its cache or in a plugin package."""
    import tiktoken

    name = spec.partition(":")[2]
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f'tokenizer "{spec}": tiktoken knows {", ".join(tiktoken.list_encoding_names())}')
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # of any HTTP library
        raise ValueError(
            f'tokenizer "{spec}": tiktoken cannot get its ranks; without a network give them as a file '
            f"NAME.tiktoken, or set TIKTOKEN_CACHE_DIR to where they are ({type(error).__name__}: {error})"
        ) from None
    special_tokens = encoding._special_tokens
    stops = stop_token_ids or tuple(special_tokens[text] for text in ("<|endoftext|>",) if text in special_tokens)
    ranks, pattern = encoding._mergeable_ranks, encoding._pat_str
    return _from_ranks(Path(spec), ranks, pattern, special_tokens.values(), stops, bos_id=None)


def _load_tekken(path: Path, stop_token_ids: tuple[int, ...]) -> Tokenizer:
    """The file holds more ranks than the vocabulary has; special tokens come first and shift all ranks."""
    content = json.loads(path.read_text())
    config = content["config"]
    num_special = config["default_num_special_tokens"]
    num_ranks = config["default_vocab_size"] - num_special
    vocab = content["vocab"][:num_ranks]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] + num_special for entry in vocab}
    return _from_ranks(path, ranks, config["pattern"], range(num_special), stop_token_ids or (2,), bos_id=1)


def _from_ranks(
    path: Path,
    ranks: dict[bytes, int],
    pattern: str,
    special_ids: Iterable[int],
    stop_ids: tuple[int, ...],
    *,
    bos_id: int | None,
) -> Tokenizer:
    """A byte-level BPE from its ranks, which are both ids and merge priorities. Ids that nothing uses are special."""
    import tiktoken

    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{len(missing)} single bytes have no rank, {missing[0]:#04x} first, so not every text has tokens"
        )
    special_ids = set(special_ids)
    both = special_ids & set(ranks.values())
    if both:
        raise ValueError(f"ids {sorted(both)[:5]} are both ranks and special tokens")
    pieces: list[bytes | None] = [None] * (max([*ranks.values(), *special_ids]) + 1)
    for piece, rank in ranks.items():
        pieces[rank] = piece
    special_ids |= {i for i, piece in enumerate(pieces) if piece is None}
    # Special tokens are withheld from the encoder, so that their spelling is ordinary text.
    encoding = tiktoken.Encoding(path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(
        name=str(path),
        table=build_table([piece or b"" for piece in pieces], special_ids, stop_ids),
        encode_text=encoding.encode_ordinary,
        bos_id=bos_id,
    )
