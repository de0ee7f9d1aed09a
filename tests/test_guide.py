"""The reproduction guide's own lines (its section 4.5), run as they stand there with a real folder in the path."""

from pathlib import Path

import pytest
import torch

from tests.small_run import PRED_LEN, command_line, figures, run_folder, train
from utils.flags import parse_flags

SNIPPET = """
# 简化的推理逻辑
import torch
from models import TimeLLM
from data_provider.data_factory import data_provider

# 1. 加载模型
model = TimeLLM.Model(args).float()
model.load_state_dict(torch.load('checkpoints/.../checkpoint'))
model.eval()

# 2. 加载测试数据
test_data, test_loader = data_provider(args, 'test')

# 3. 推理
with torch.no_grad():
    for batch_x, batch_y, batch_x_mark, batch_y_mark in test_loader:
        outputs = model(batch_x, batch_x_mark, dec_inp, batch_y_mark)
        # 保存或分析 outputs
"""


@pytest.mark.parametrize("features", ["M", "MS"])
@pytest.mark.parametrize("flags", ["of the training", "of the checkpoint"])
def test_inference_of_section_4_5(backbones, capsys, tmp_path: Path, flags: str, features: str) -> None:
    # The words of a prompt are a flag; without it a run makes them from its file.
    text = "Load and flow of a town." if flags == "of the training" else None
    words = command_line(tmp_path, backbones["qwen2"], max_iters=4, features=features, prompt_text=text)
    train(words, capsys)
    folder = run_folder(words)
    expected = figures(train([*words, "--is_training", "0"], capsys))

    args = parse_flags(words if text else ["--is_training", "0", "--checkpoint", str(folder)])
    kept = []
    code = SNIPPET.replace("checkpoints/...", str(folder)).replace("# 保存或分析 outputs", "kept.append((outputs, batch_y))")
    names = {"args": args, "dec_inp": None, "kept": kept}
    exec(code, names)
    assert sum(len(outputs) for outputs, _ in kept) == len(names["test_data"]) == 57
    assert names["batch_x_mark"].shape[:2] == names["batch_x"].shape[:2]
    assert names["batch_y_mark"].shape[:2] == names["batch_y"].shape[:2]
    channels = slice(-1, None) if features == "MS" else slice(None)
    errors = torch.cat([outputs[..., channels] - truth[:, -PRED_LEN:, channels] for outputs, truth in kept]).double()
    assert float(errors.square().mean()) == pytest.approx(float(expected[0]), abs=2e-7)
    assert float(errors.abs().mean()) == pytest.approx(float(expected[1]), abs=2e-7)
