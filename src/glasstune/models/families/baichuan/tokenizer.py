"""Baichuan's tokenizer: a sentencepiece BPE model as a `tokenizers` one, with the same ids.

sentencepiece joins the neighbours whose joint piece has the best score, the leftmost of equals;
`tokenizers` joins by a list of pairs in order. The list made here holds every way to cut a piece
in two, pieces by score, so both take the same steps. What is not that simple (unigram models,
unused pieces) is refused.

Where a folder was saved from here, it holds `tokenizer.json` under a class of transformers' own,
so that it opens without Glasstune.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from glasstune.core.errors import InputError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_SPACE = "▁"
_SAVED_CLASS = "PreTrainedTokenizerFast"


class BaichuanTokenizer(PreTrainedTokenizerFast):
    """Takes the place of the class of that name in a checkpoint's code.

    It is made from `tokenizer.model`, or from `tokenizer.json` where there is one. A begin token
    is added unless `tokenizer_config.json` says `add_bos_token: false`, as the published ones of
    7B do.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ("input_ids", "attention_mask")

    @classmethod
    def convert_to_native_format(
        cls, trust_remote_code: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the constructor's keywords; transformers calls it with the files' paths."""
        kwargs.setdefault("add_bos_token", True)
        json_file, model_file = kwargs.get("tokenizer_file"), kwargs.get("vocab_file")
        if isinstance(json_file, str) and os.path.isfile(json_file):
            return kwargs
        if isinstance(model_file, str) and os.path.isfile(model_file):
            kwargs.pop("tokenizer_file", None)
            kwargs["tokenizer_object"] = from_sentencepiece(Path(model_file))
            for name, token in (
                ("unk_token", "<unk>"),
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
            ):
                kwargs.setdefault(name, token)
        return kwargs

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Saves `tokenizer.json`, under a class that opens it without the checkpoint's code."""
        files = super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / "tokenizer_config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        content["tokenizer_class"] = _SAVED_CLASS
        for name in ("auto_map", "use_fast", "sp_model_kwargs"):
            content.pop(name, None)
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
        return files


class BaiChuanTokenizer(BaichuanTokenizer):
    """The name that the first 7B checkpoint gives it."""


def from_sentencepiece(file: Path) -> Tokenizer:
    """Makes the same tokenizer of a sentencepiece BPE model.

    Args:
        file: `tokenizer.model`.

    Raises:
        InputError: `bad_tokenizer`: the file is damaged, or its model is not BPE.
    """
    proto = _read(file)
    pieces = proto.pieces
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    unknown = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None)
    has_bytes = any(piece.type == _BYTE for piece in pieces)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, _merges(pieces, vocabulary), unk_token=unknown, fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )  # fmt: skip
    rules = proto.normalizer_spec
    tokenizer.normalizer = normalizers.Sequence(_normal(rules))
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, normalized=False) for p in pieces if p.type in (_UNKNOWN, _CONTROL)]
    )
    # Looked for in the normalised text, as sentencepiece does.
    tokenizer.add_tokens([AddedToken(p.piece, normalized=True) for p in pieces if p.type == _USER])
    return tokenizer


def _read(file: Path) -> Any:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    content = file.read_bytes()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except (RuntimeError, OSError) as error:
        raise _bad(file, "it is no sentencepiece model, or it is damaged") from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    if not proto.pieces:
        raise _bad(file, "it holds no pieces")
    if proto.trainer_spec.model_type != _BPE:
        raise _bad(file, "its model is not BPE")
    if any(piece.type == _UNUSED for piece in proto.pieces):
        raise _bad(file, "it has unused pieces, which sentencepiece cuts again")
    return proto


def _bad(file: Path, says: str) -> InputError:
    fix = "download it again, or put a tokenizer.json beside it"
    return InputError("bad_tokenizer", says, where=str(file), fix=fix)


def _merges(pieces: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns every cut of a piece into two, the best piece first."""
    ranked = sorted((piece for piece in pieces if piece.type == _NORMAL), key=_rank)
    # Of two cuts that overlap in a text the longer left part is nearly always the leftmost one.
    return [
        (text[:cut], text[cut:])
        for text in (piece.piece for piece in ranked)
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]


def _rank(piece: Any) -> float:
    return -float(piece.score)


def _normal(rules: Any) -> list[Any]:
    """Returns sentencepiece's normalisation, step by step."""
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return [*steps, normalizers.Replace(" ", _SPACE)]
