"""Exam rows 24, 26 and 37: what SAID learns, where LongLoRA's attention is sparse, and the order of Self-Instruct.

(Rows 2, 25, 27: test_exam_lora.py; 28: test_nf4.py; 38: tests/continual, test_ewc.py, test_rehearsal.py,
test_progressive.py and test_fel.py.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bildung.instruct import self_instruct as module
from bildung.instruct.writer import Manner, Reply
from bildung.model.shifted_attention import shifted_attention
from bildung.model.store import LanguageModel
from bildung.tune import said


def test_row_24_said_is_one_scalar_per_matrix_beside_a_shared_vector(tiny_lm: LanguageModel) -> None:
    chosen = said.add_intrinsic(tiny_lm.model, said.Settings(data="-", dimension=100))
    trained = [parameter for parameter in tiny_lm.model.parameters() if parameter.requires_grad]
    assert sorted(one.numel() for one in trained) == [1] * len(chosen) + [100 - len(chosen)]
    first, second, *_ = (linear.deltas[said.DELTA] for linear in chosen.values())
    assert first.theta_d is second.theta_d
    with torch.no_grad():
        first.theta_d.normal_(generator=torch.Generator().manual_seed(0))
        before = first.weight(), second.weight()
        first.scale.mul_(3)
    torch.testing.assert_close(first.weight(), 3 * before[0])
    assert torch.equal(second.weight(), before[1])


def test_row_26_shifted_sparse_attention_of_8_tokens_in_groups_of_4() -> None:
    """The first half of the heads sees 0-3 and 4-7, the second 0-1, 2-5 and 6-7; nobody sees what follows."""
    allowed = []

    def kernel(q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    for other in range(8):  # whose value arrives where: v is 1 at one place alone
        v = torch.zeros(1, 2, 8, 8)
        v[:, :, other] = 1
        q = k = torch.zeros(1, 2, 8, 8)
        allowed.append(shifted_attention(q, k, v, None, 4, kernel)[0, :, :, 0] > 0)
    sees = torch.stack(allowed, dim=-1)  # head, token, token seen
    for head, starts in enumerate(((0, 4), (0, 2, 6))):
        for token in range(8):
            start = max(one for one in starts if one <= token)
            assert sees[head, token].nonzero().flatten().tolist() == list(range(start, token + 1))


class Asked:
    """A writer that notes what it is asked, and says that tasks with "kind" in them are classifications."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def write(self, prompts: Sequence[str], manner: Manner, seed: int) -> list[Reply]:
        return [Reply(self.one(prompt), False) for prompt in prompts]

    def one(self, prompt: str) -> str:
        if prompt.startswith("Come up with"):
            self.order.append("instructions")
            number = 1 + len(re.findall(r"^[0-9]+", prompt, re.MULTILINE))
            return f" Describe bread, water and salt.\n{number}. Say of what kind a whale is."
        if prompt.endswith("Classification:"):
            self.order.append("classification?")
            return " Yes" if "kind" in prompt.rsplit("Task:", 1)[1] else " No"
        output_first = "the class, then" in prompt
        self.order.append("output first" if output_first else "input first")
        return "Output: one\nInput: it" if output_first else "Input: it\nOutput: one"


def test_row_37_instructions_then_classification_then_instances_in_their_order(
    tiny_lm_directory: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    writer = Asked()
    monkeypatch.setattr(module, "LocalWriter", lambda *_: writer)
    settings = module.Settings(instructions=2, batch_size=1, new_tokens=20)
    record = module.self_instruct(tiny_lm_directory, tmp_path / "out", settings)
    steps = list(dict.fromkeys(writer.order))
    assert steps[:2] == ["instructions", "classification?"] and set(steps[2:]) == {"input first", "output first"}
    assert writer.order == sorted(writer.order, key=lambda one: min(steps.index(one), 2))  # no stage begins early
    assert record.measured["instances"] == 2 and record.measured["classifications"] == 1
