"""Inspect records made by hand, with the byte formulas of bitsandbytes: no model is built.

They have the shape of the real ones: BLOOM 2.6B with LoRA and findings, Llama-3-70B, a mixture
whose experts are modules.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod
from typing import Any

from glasstune.core.findings import Finding
from glasstune.core.inspection import (
    ErrorReport,
    InspectRecord,
    LayerError,
    LoraOverlay,
    ModuleRow,
    PrecisionRecord,
)

LABELS = {16: "bfloat16", 8: "LLM.int8", 4: "NF4, double quantisation"}
NAMES = {8: "Linear8bitLt", 4: "Linear4bit"}
DTYPES = {16: "bfloat16", 8: "int8", 4: "nf4"}
VERSIONS = {"torch": "2.13.0", "transformers": "5.24.0", "bitsandbytes": "0.50.2", "peft": "0.21.2"}
KEPT = {
    "output_head": "the output head stays at 16 bit by transformers' default list",
    "not_linear": "only nn.Linear and Conv1D are converted, this is neither",
}

Spec = tuple[str, str, str, tuple[int, ...], bool, bool]
"""Path, class, detail, shape of the weight, whether it has a bias, whether it is a container."""


def linear(path: str, inside: int, outside: int, bias: bool = False) -> Spec:
    detail = f"in_features={inside}, out_features={outside}, bias={bias}"
    return (path, "Linear", detail, (outside, inside), bias, False)


def container(path: str, name: str) -> Spec:
    return (path, name, "", (), False, True)


def weightless(path: str, name: str, detail: str = "") -> Spec:
    return (path, name, detail, (), False, False)


def bloom(layers: int = 30, hidden: int = 2560, vocabulary: int = 46145) -> list[Spec]:
    norm = f"({hidden},), eps=1e-05, elementwise_affine=True, bias=True"
    specs = [
        container("", "BloomForCausalLM"),
        container("transformer", "BloomModel"),
        ("transformer.word_embeddings", "Embedding", f"{vocabulary}, {hidden}",
         (vocabulary, hidden), False, False),
        ("transformer.word_embeddings_layernorm", "LayerNorm", norm, (hidden,), True, False),
        container("transformer.h", "ModuleList"),
    ]  # fmt: skip
    for index in range(layers):
        at = f"transformer.h.{index}"
        specs += [
            container(at, "BloomBlock"),
            (f"{at}.input_layernorm", "LayerNorm", norm, (hidden,), True, False),
            container(f"{at}.self_attention", "BloomAttention"),
            linear(f"{at}.self_attention.query_key_value", hidden, 3 * hidden, True),
            linear(f"{at}.self_attention.dense", hidden, hidden, True),
            weightless(f"{at}.self_attention.attention_dropout", "Dropout", "p=0.0, inplace=False"),
            (f"{at}.post_attention_layernorm", "LayerNorm", norm, (hidden,), True, False),
            container(f"{at}.mlp", "BloomMLP"),
            linear(f"{at}.mlp.dense_h_to_4h", hidden, 4 * hidden, True),
            weightless(f"{at}.mlp.gelu_impl", "BloomGelu"),
            linear(f"{at}.mlp.dense_4h_to_h", 4 * hidden, hidden, True),
        ]
    specs += [
        ("transformer.ln_f", "LayerNorm", norm, (hidden,), True, False),
        linear("lm_head", hidden, vocabulary),
    ]
    return specs


def llama(
    layers: int = 80, hidden: int = 8192, inner: int = 28672, kv: int = 1024,
    vocabulary: int = 128256,
) -> list[Spec]:  # fmt: skip
    specs = [
        container("", "LlamaForCausalLM"),
        container("model", "LlamaModel"),
        ("model.embed_tokens", "Embedding", f"{vocabulary}, {hidden}", (vocabulary, hidden),
         False, False),
        container("model.layers", "ModuleList"),
    ]  # fmt: skip
    norm = f"({hidden},), eps=1e-05"
    for index in range(layers):
        at = f"model.layers.{index}"
        specs += [
            container(at, "LlamaDecoderLayer"),
            container(f"{at}.self_attn", "LlamaAttention"),
            linear(f"{at}.self_attn.q_proj", hidden, hidden),
            linear(f"{at}.self_attn.k_proj", hidden, kv),
            linear(f"{at}.self_attn.v_proj", hidden, kv),
            linear(f"{at}.self_attn.o_proj", hidden, hidden),
            container(f"{at}.mlp", "LlamaMLP"),
            linear(f"{at}.mlp.gate_proj", hidden, inner),
            linear(f"{at}.mlp.up_proj", hidden, inner),
            linear(f"{at}.mlp.down_proj", inner, hidden),
            weightless(f"{at}.mlp.act_fn", "SiLUActivation"),
            (f"{at}.input_layernorm", "LlamaRMSNorm", norm, (hidden,), False, False),
            (f"{at}.post_attention_layernorm", "LlamaRMSNorm", norm, (hidden,), False, False),
        ]
    specs += [
        ("model.norm", "LlamaRMSNorm", norm, (hidden,), False, False),
        weightless("model.rotary_emb", "LlamaRotaryEmbedding"),
        linear("lm_head", hidden, vocabulary),
    ]
    return specs


def mixture(layers: int = 32, experts: int = 64) -> list[Spec]:
    """Experts as a ModuleList of Linears, the last layer dense."""
    specs = [
        container("", "TinyMoeForCausalLM"),
        container("model", "TinyMoeModel"),
        ("model.embed_tokens", "Embedding", "32000, 1024", (32000, 1024), False, False),
        container("model.layers", "ModuleList"),
    ]
    for index in range(layers):
        at = f"model.layers.{index}"
        specs += [
            container(at, "TinyMoeLayer"),
            linear(f"{at}.router", 1024, experts),
            container(f"{at}.experts", "ModuleList"),
        ]
        for number in range(experts if index < layers - 1 else 1):
            specs += [
                container(f"{at}.experts.{number}", "TinyExpert"),
                linear(f"{at}.experts.{number}.up", 1024, 4096),
                linear(f"{at}.experts.{number}.down", 4096, 1024),
            ]
    return [*specs, linear("lm_head", 1024, 32000)]


def weight_parts(count: int, out: int, bits: int) -> dict[str, int]:
    """Bytes of one quantised weight: LLM.int8, or NF4 with double quantisation."""
    if bits == 8:
        return {"weights": count, "scales": 4 * out}
    blocks = ceil(count / 64)
    return {
        "weights": ceil(count / 2),
        "scales": blocks + 4 * ceil(blocks / 256) + 4,
        "code": 64 + 1024,
    }


def row(spec: Spec, bits: int, targets: tuple[str, ...], rank: int) -> ModuleRow:
    path, name, detail, shape, bias, is_container = spec
    count = prod(shape) if shape else 0
    leaf = path.rpartition(".")[2]
    converts = name == "Linear" and leaf != "lm_head" and bits != 16
    parts: dict[str, int] = {}
    code = reason = ""
    if count:
        parts = weight_parts(count, shape[0], bits) if converts else {"weights": 2 * count}
        if bits == 16:
            code, reason = "sixteen_bit", "nothing is quantised at 16 bit"
        elif converts:
            code, reason = "converted", "an nn.Linear outside the skip list"
        else:
            code = "output_head" if name == "Linear" else "not_linear"
            reason = KEPT[code]
    if bias:
        parts["bias"] = 2 * shape[0]
    lora = None
    if leaf in targets and name == "Linear":
        added = rank * (shape[0] + shape[1])
        lora = LoraOverlay("lora", rank, 2.0 * rank, added, 4 * added, 4 * added, 8 * added)
    return ModuleRow(
        path=path, class_name=NAMES[bits] if converts else name, original_class=name,
        detail=detail, container=is_container, shape=list(shape) or None,
        dtype=(DTYPES[bits] if converts else "bfloat16") if count else "",
        bytes=sum(parts.values()), parts=parts,
        parameters=count + (shape[0] if bias else 0),
        transient_bytes=2 * count if converts and bits == 4 else 0,
        trainable=False, tied_to=None, reason_code=code, reason=reason, lora=lora,
    )  # fmt: skip


def precision(
    specs: list[Spec], bits: int, targets: tuple[str, ...] = (), rank: int = 16
) -> PrecisionRecord:
    rows = [row(spec, bits, targets, rank) for spec in specs]
    by_part: dict[str, int] = {}
    for item in rows:
        for part, size in item.parts.items():
            name = part
            if part in ("weights", "bias"):
                kept = item.class_name == item.original_class or part == "bias"
                name = "16bit" if kept else f"{bits}bit"
            by_part[name] = by_part.get(name, 0) + size
    everything = sum(item.parameters for item in rows)
    kept = sum(item.parameters for item in rows if item.class_name == item.original_class)
    options: dict[int, dict[str, Any]] = {
        16: {},
        8: {"load_in_8bit": True},
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }
    return PrecisionRecord(
        bits=bits, label=LABELS[bits], quantization=options[bits],
        total_bytes=sum(item.bytes for item in rows), bytes_by_part=by_part,
        kept_parameters=kept, kept_share=kept / everything,
        largest_transient_bytes=max(item.transient_bytes for item in rows),
        adapter_bytes=sum(
            item.lora.weight_bytes + item.lora.gradient_bytes + item.lora.optimizer_bytes
            for item in rows if item.lora
        ),
        modules=rows,
    )  # fmt: skip


def record(
    model: str, family: str, specs: list[Spec], *, bits: tuple[int, ...] = (16, 8, 4),
    targets: tuple[str, ...] = (), rank: int = 16, **fields: Any,
) -> InspectRecord:  # fmt: skip
    trees = {str(number): precision(specs, number, targets, rank) for number in bits}
    first = next(iter(trees.values())).modules
    base = sum(item.parameters for item in first)
    added = sum(item.lora.parameters for item in first if item.lora)
    share = 100 * added / (base + added)
    made = InspectRecord(
        model=model, family=family, architecture=first[0].class_name, source="config",
        rule="exactly nn.Linear or Conv1D converts (transformers 5.24.0)", versions=VERSIONS,
        precisions=trees, trainable_parameters=added, all_parameters=base + added,
        peft_line=f"trainable params: {added:,} || all params: {base + added:,} "
        f"|| trainable%: {share:.4f}",
        adapter={"r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets)}
        if targets
        else None,
    )  # fmt: skip
    return replace(made, **fields)


def bloom_record(layers: int = 30) -> InspectRecord:
    """BLOOM 2.6B at three precisions with LoRA on two of four Linears, findings and errors."""
    made = record(
        "bloom-2b6/config.json", "bloom", bloom(layers), targets=("query_key_value", "dense"),
        findings=[
            Finding(
                "untrained_tokens", "info", "transformer.word_embeddings",
                "The embedding has 46,145 rows and stays frozen: new tokens would not learn.",
                "Add modules_to_save: [word_embeddings], or trainable_token_indices.",
            )
        ],
        error=ErrorReport(
            layers=[
                LayerError(
                    f"transformer.h.{index}.{name}", shape,
                    {"8": 0.009 + 0.0001 * index, "nf4": 0.094 + 0.001 * index,
                     "fp4": 0.118 + 0.001 * index},
                )
                for index in reversed(range(layers))
                for name, shape in (
                    ("self_attention.query_key_value", [7680, 2560]),
                    ("mlp.dense_4h_to_h", [2560, 10240]),
                )
            ],
            mean={"8": 0.0105, "nf4": 0.1092, "fp4": 0.1331}, source="bloom-2b6", seconds=41.3,
        ),
    )  # fmt: skip
    made.precisions["4"].findings = [
        Finding(
            "kept_share",
            "warning",
            "",
            "9.4 % of the parameters stay at 16 bit: they take 472.6 MB of 1.90 GB.",
            "",
        ),
    ]
    made.precisions["8"].findings = [
        Finding(
            "int8_checkpointing",
            "warning",
            "transformer.h",
            "LLM.int8 keeps each layer's input for the backward: recomputation saves less.",
            "Use model.int8_compute: w8a16.",
        ),
        Finding("kept_share", "warning", "", "9.4 % of the parameters stay at 16 bit.", ""),
    ]
    return made


def llama70b_record() -> InspectRecord:
    """Llama-3-70B with LoRA on all seven Linears, no findings."""
    return record(
        "meta-llama/Meta-Llama-3-70B", "llama", llama(), source="hub",
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )  # fmt: skip
