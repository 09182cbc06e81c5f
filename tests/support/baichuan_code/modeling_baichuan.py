"""Stands for the code file that comes with a Baichuan2-7B checkpoint, from its description.

A server with `trust_remote_code` runs such a file. It is written apart from Glasstune's own family,
in plain products, and serves as the truth about it.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_baichuan import BaichuanConfig


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        root = x.float().pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return self.weight * (x.float() * root).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.W_pack = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        rows, length, width = x.shape
        size = width // self.heads
        q, k, v = (
            part.view(rows, length, self.heads, size).transpose(1, 2)
            for part in self.W_pack(x).split(width, dim=-1)
        )
        angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
        cos, sin = (torch.cat([f(angle), f(angle)], -1).to(x.dtype) for f in (torch.cos, torch.sin))

        def turned(t):
            return t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin

        scores = turned(q) @ turned(k).transpose(-1, -2) / size**0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        share = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.o_proj((share @ v).transpose(1, 2).reshape(rows, length, width))


class Feed(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Feed(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight))


class BaichuanForCausalLM(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = Body(config), Head(config)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
        logits = self.lm_head(self.model(input_ids))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)
