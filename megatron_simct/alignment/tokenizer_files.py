"""The tokenizer files that can be loaded.

Loaded, each by the library made for it (imported inside the loading function):
    tokenizer.json                Hugging Face tokenizers (hf_tokenizer.py)
    NAME.model, NAME.model.v3     SentencePiece
    NAME.tiktoken                 tiktoken ranks, beside NAME.tiktoken.json = {"pattern": regex,
                                  "special_tokens": {text: id}, "stop_tokens": [text]}
    tiktoken:NAME                 an encoding that tiktoken itself knows, such as o200k_base
    tekken*.json                  Mistral's ranks in JSON
    a folder                      its tokenizer.json, else tekken.json, else tokenizer.model
The files beside tokenizer.json, tekken.json and tokenizer.model are read too (hf_folder.py). If
tokenizer.model holds tiktoken ranks, tokenizer.model.json is as NAME.tiktoken.json.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from megatron_simct.alignment.continuations import CutRules, Merges
from megatron_simct.alignment.folder_tokens import BesideVocabulary, beside_vocabulary
from megatron_simct.alignment.hf_folder import AddedToken, HfFolder, read_folder, tokenizer_file
from megatron_simct.alignment.hf_tokenizer import load_hf_tokenizer
from megatron_simct.alignment.tokenizer import Tokenizer, build_table, encode_cut

_ACCEPTED = (
    "accepted are a Hugging Face tokenizer.json or its folder, a SentencePiece model (NAME.model), tiktoken "
    "ranks (NAME.tiktoken with NAME.tiktoken.json beside it), tiktoken:NAME, and Mistral's tekken*.json"
)


def load_tokenizer(spec: str, stop_token_ids: Iterable[int] = (), *, allow_lossy: bool = False) -> Tokenizer:
    """Loads the tokenizer `spec`, a file or a Hugging Face folder; `stop_token_ids` replaces the stop tokens
    it names.

    The first stop id is the one that a retokenized response ends with, so give what the model emits to end
    its turn. Raises ValueError, naming the file, if it cannot be read, is of no accepted kind, has no stop
    token, or would not spell text as it is (a normalizer that rewrites text, WordPiece). With allow_lossy the
    last is not an error; what such a tokenizer changes is left out of every comparison, and `Tokenizer.lossy`
    has the reason.
    """
    if spec.startswith("tiktoken:"):
        return _load_tiktoken_encoding(spec, tuple(stop_token_ids))
    path = Path(spec)
    if not path.exists():
        raise ValueError(f'tokenizer "{spec}" does not exist; {_ACCEPTED}')
    try:
        if path.is_dir():
            path = _file_of(path)
        # Read once; the tokenizer, BOS, stop ids and the template's variables are all from this record.
        in_folder = path.name in ("tokenizer.json", "tekken.json", "tokenizer.model")
        folder = read_folder(path.parent) if in_folder else None
        stop_ids = tuple(stop_token_ids)
        if path.name == "tokenizer.json":
            assert folder is not None
            return load_hf_tokenizer(path, folder, stop_ids, allow_lossy=allow_lossy)
        if path.suffix == ".tiktoken" or _holds_ranks(path):
            return _load_tiktoken(path, folder, stop_ids)
        if re.search(r"\.model(\.\w+)?$", path.name):
            return _load_sentencepiece(path, folder, stop_ids, allow_lossy=allow_lossy)
        if re.fullmatch(r"tekken.*\.json", path.name):
            return _load_tekken(path, folder, stop_ids)
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'tokenizer "{spec}" cannot be used: {type(error).__name__}: {error}; {_ACCEPTED}'
        ) from error
    raise ValueError(f'tokenizer "{spec}" is of an unknown kind; {_ACCEPTED}')


def _file_of(folder: Path) -> Path:
    """The tokenizer of a folder. FileNotFoundError, naming what is there instead."""
    found = tokenizer_file(folder)
    if found is not None:
        return found
    others = sorted(
        path.name
        for path in folder.iterdir()
        if re.search(r"^(vocab|merges|spiece|tekken|tokenizer|tiktoken)|\.(model|tiktoken)", path.name)
        and path.name not in ("tokenizer_config.json", "tokenizer_class.txt")
    )
    instead = (
        f"; of {', '.join(others)} give the file itself, or a tokenizer.json made from it" if others else ""
    )
    raise FileNotFoundError(f"the folder holds no tokenizer.json, tekken.json or tokenizer.model{instead}")


def _holds_ranks(path: Path) -> bool:
    """Whether a file called NAME.model holds tiktoken ranks (Llama 3, Kimi): lines of a
    base64 text and a number.
    """
    if ".model" not in path.name:
        return False
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\r?\n?", file.readline(1000)) is not None


# A serialized protobuf message followed by another one is their merge, the later value of a field winning. So
# the normalizer of a SentencePiece model is changed by appending a ModelProto that holds only normalizer_spec
# (field 3): add_dummy_prefix (3) = false, remove_extra_whitespaces (4) = false; or precompiled_charsmap (2) =
# "".
_KEEP_BLANKS = bytes([0x1A, 4, 0x18, 0, 0x20, 0])
_NO_CHARSMAP = bytes([0x1A, 2, 0x12, 0])


def _load_sentencepiece(
    path: Path, folder: HfFolder | None, stop_token_ids: tuple[int, ...], *, allow_lossy: bool
) -> Tokenizer:
    import sentencepiece

    def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=model)

    model = path.read_bytes() + _KEEP_BLANKS
    sp = processor(model)
    # A character map takes hundreds of kilobytes, an empty field two bytes.
    charsmap_bytes = len(sp.serialized_model_proto()) - len(
        processor(model + _NO_CHARSMAP).serialized_model_proto()
    )
    ids = range(sp.get_piece_size())
    pieces = [_piece_bytes(sp.id_to_piece(i), is_byte=sp.is_byte(i)) for i in ids]
    special_ids = {i for i in ids if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)}
    missing = set(range(256)) - {
        piece[0] for i, piece in enumerate(pieces) if len(piece) == 1 and i not in special_ids
    }
    lossy = None
    if charsmap_bytes > 2:
        lossy = (
            f"its normalizer rewrites text (a character map of {charsmap_bytes} bytes, as nmt_nfkc has), so "
            "its tokens would not spell the response; only identity normalizers are supported"
        )
    elif sp.normalize("  a  b ") != "▁▁a▁▁b▁":
        lossy = f'its normalizer turns "  a  b " into "{sp.normalize("  a  b ")}" instead of keeping blanks'
    elif missing:
        lossy = (
            f"{len(missing)} single bytes have no token, {min(missing):#04x} first, so not every text has "
            "tokens"
        )
    if lossy is not None and not allow_lossy:
        raise ValueError(lossy)

    beside = BesideVocabulary()
    if folder is not None:
        names = {sp.id_to_piece(i): i for i in ids}
        beside = beside_vocabulary(path, folder, names, special_ids, size=len(ids))
    own_eos = {sp.eos_id(): path.name} if sp.eos_id() >= 0 else {}
    sources = dict.fromkeys(stop_token_ids, "given") or dict(beside.stop_sources) or own_eos
    pieces += [token.content.encode() for token in beside.added]
    # Pieces of the kind USER_DEFINED are found in any text, and some models' special tokens are of that kind.
    # Cutting the text behind the first character of such a piece keeps its spelling ordinary text.
    found = [sp.id_to_piece(i) for i in {**sources, **dict.fromkeys(beside.special_ids)} if i in ids]
    found = [piece for piece in found if sp.piece_to_id(piece) not in special_ids]
    cuts = re.compile("|".join(f"(?<={re.escape(piece[0])})(?={re.escape(piece[1:])})" for piece in found))
    encode = partial(encode_cut, sp.encode, cuts) if found else sp.encode
    content = [token for token in beside.added if not token.special and token.token_id not in sources]
    bos_id, notes = _sentencepiece_bos(sp.bos_id(), folder, beside)
    return Tokenizer(
        name=str(path),
        table=build_table(pieces, special_ids | beside.special_ids, tuple(sources), normalizer=lossy or ""),
        encode_text=partial(_encode_added, encode, _finder(content), {t.content: t.token_id for t in content})
        if content
        else encode,
        bos_id=bos_id,
        stop_sources=sources,
        notes=notes,
        lossy=lossy,
    )


def _sentencepiece_bos(
    own: int, folder: HfFolder | None, beside: BesideVocabulary
) -> tuple[int | None, tuple[str, ...]]:
    """The id that a prompt starts with: add_bos_token of the folder decides; without it,
    the model's own BOS.
    """
    bos_id = own if own >= 0 else None
    if folder is None or bos_id is None and beside.bos_id is None:
        return bos_id, beside.notes
    if folder.adds_bos is not None:
        first = beside.bos_id if beside.bos_id is not None else bos_id
        return first if folder.adds_bos else None, beside.notes
    note = (
        f"tokenizer_config.json has no add_bos_token: a prompt begins with BOS {bos_id}, as tokenizer.model "
        "has it (transformers 5 puts none)"
    )
    return bos_id, (*beside.notes, *([note] if folder.settings and bos_id is not None else []))


def _finder(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """Finds the tokens in a text, the longest of those that begin at one place; a group, so that a split
    keeps them.
    """

    def pattern(token: AddedToken) -> str:
        text = re.escape(token.content)
        return rf"(?<!\w){text}(?!\w)" if token.single_word else text

    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    return re.compile(f"({'|'.join(map(pattern, longest_first))})")


def _encode_added(
    encode: Callable[[str], Sequence[int]], finder: re.Pattern[str], ids: dict[str, int], text: str
) -> list[int]:
    """Content ids of a text with added tokens in it."""
    parts = enumerate(finder.split(text))
    # Of a split by one group every second part is what the group matched.
    return [i for number, part in parts for i in ([ids[part]] if number % 2 else encode(part))]


def _piece_bytes(piece: str, *, is_byte: bool) -> bytes:
    """'▁' stands for a blank, a byte piece '<0x0A>' for that byte."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()


def _load_tiktoken(path: Path, folder: HfFolder | None, stop_token_ids: tuple[int, ...]) -> Tokenizer:
    beside_it = path.with_name(path.name + ".json")
    if path.suffix != ".tiktoken" and not beside_it.exists():
        raise ValueError(
            "it holds tiktoken ranks, which do not say how text is cut before they merge it, nor the special "
            "tokens; "
            f'write {beside_it.name} with {{"pattern": regex, "special_tokens": {{text: id}}, "stop_tokens": '
            f"[text]}} "
            "beside it, or give the model's tokenizer.json"
        )
    ranks = {}
    for line in path.read_bytes().splitlines():
        if line:
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    sidecar = json.loads(beside_it.read_text())
    special_tokens = sidecar["special_tokens"]
    beside = BesideVocabulary()
    if folder is not None:
        size = max([*ranks.values(), *special_tokens.values()]) + 1
        beside = beside_vocabulary(path, folder, special_tokens, set(special_tokens.values()), size=size)
        _refuse_added(folder, beside, beside_it.name)
    own = {special_tokens[text]: beside_it.name for text in sidecar["stop_tokens"]}
    sources = dict.fromkeys(stop_token_ids, "given") or own
    bos_id = beside.bos_id if folder is not None and folder.adds_bos else None
    return _from_ranks(
        path, ranks, sidecar["pattern"], special_tokens.values(), sources, bos_id=bos_id, notes=beside.notes
    )


def _refuse_added(folder: HfFolder, beside: BesideVocabulary, where: str) -> None:
    if beside.added:
        token = beside.added[0]
        raise ValueError(
            f"{folder.path / token.source}: added token {token.content!r} (id {token.token_id}) is not among "
            f"the special tokens of {where}; add it there"
        )


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
            f'tokenizer "{spec}": tiktoken cannot download its ranks; without a network, give the ranks as a '
            f"file NAME.tiktoken, or set TIKTOKEN_CACHE_DIR to their folder ({type(error).__name__}: {error})"
        ) from None
    special_tokens = encoding._special_tokens
    own = {special_tokens[text]: name for text in ("<|endoftext|>",) if text in special_tokens}
    stops = dict.fromkeys(stop_token_ids, "given") or own
    ranks, pattern = encoding._mergeable_ranks, encoding._pat_str
    return _from_ranks(Path(spec), ranks, pattern, special_tokens.values(), stops, bos_id=None)


def _load_tekken(path: Path, folder: HfFolder | None, stop_token_ids: tuple[int, ...]) -> Tokenizer:
    """The file holds more ranks than the vocabulary has; special tokens come first and shift all ranks."""
    content = json.loads(path.read_text(encoding="utf-8"))
    config = content["config"]
    num_special = config["default_num_special_tokens"]
    num_ranks = config["default_vocab_size"] - num_special
    vocab = content["vocab"][:num_ranks]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] + num_special for entry in vocab}
    # Older files do not list the special tokens; the first three are the same in all.
    listed = content.get("special_tokens") or []
    names = {"<unk>": 0, "<s>": 1, "</s>": 2} | {entry["token_str"]: entry["rank"] for entry in listed}
    outside = [text for text, token_id in names.items() if not 0 <= token_id < num_special]
    if outside:
        raise ValueError(
            f"special token {outside[0]!r} has the id {names[outside[0]]} of {num_special} special ids"
        )
    beside = BesideVocabulary()
    if folder is not None:
        every_id = {f"<SPECIAL_{i}>": i for i in set(range(num_special)) - set(names.values())} | names
        size = config["default_vocab_size"]
        beside = beside_vocabulary(path, folder, every_id, set(range(num_special)), size=size)
        _refuse_added(folder, beside, path.name)
    sources = (
        dict.fromkeys(stop_token_ids, "given") or dict(beside.stop_sources) or {names["</s>"]: path.name}
    )
    special_ids, bos_id = range(num_special), names["<s>"]
    return _from_ranks(
        path, ranks, config["pattern"], special_ids, sources, bos_id=bos_id, notes=beside.notes
    )


def _rank_rules(pieces: Sequence[bytes], pattern: str) -> CutRules:
    """The rules of ranks: every pair whose join has a rank merges, the join of lowest rank first."""
    import regex  # type: ignore[import-untyped]  # tiktoken reads patterns with it

    return CutRules(Merges.of(pieces), regex.compile(pattern).findall)


def _from_ranks(
    path: Path,
    ranks: dict[bytes, int],
    pattern: str,
    special_ids: Iterable[int],
    stop_sources: dict[int, str],
    *,
    bos_id: int | None,
    notes: tuple[str, ...] = (),
) -> Tokenizer:
    """A byte-level BPE from its ranks, which are both ids and merge priorities.

    Ids that nothing uses are special.
    """
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
    content = [piece or b"" for piece in pieces]
    return Tokenizer(
        name=str(path),
        table=build_table(content, special_ids, tuple(stop_sources)),
        encode_text=encoding.encode_ordinary,
        cut_rules=partial(_rank_rules, content, pattern),
        bos_id=bos_id,
        stop_sources=stop_sources,
        notes=notes,
    )
