from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from tests.train.tiny import make_checkpoint, make_tokenizer
from train.batch import Batch
from train.errors import TrainError
from train.model import load_model
from train.objectives import make_objective
from train.teacher import Precision, load_teacher


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("precision", "error"), [("float32", 0.0), ("bfloat16", 0.1), ("int8", 0.1), ("nf4", 0.5)])
def test_precisions_teach_alike(precision: Precision, error: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = make_checkpoint(tmp_path, hidden_size=64, intermediate_size=128)
    student = load_model(checkpoint, dtype=torch.float32)
    teacher = load_teacher(checkpoint, checkpoint, precision)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    tokens = torch.randint(260, (2, 16))
    batch = Batch(tokens, torch.arange(16).expand(2, 16), tokens)
    with torch.no_grad():
        exact, found = (model(tokens, batch.positions, linear).float() for model in (student, teacher))
    assert (exact - found).abs().max() <= error
    if precision != "float32":
        assert not torch.equal(exact, found)
    loss = make_objective("distill", teacher=teacher)(student, batch)
    loss.total.backward()
    assert loss.total.item() / batch.count < error + 1e-5


def test_other_tokens_and_precisions_are_refused(tmp_path: Path) -> None:
    student, teacher = make_checkpoint(tmp_path / "student"), make_checkpoint(tmp_path / "teacher")
    with pytest.raises(TrainError, match="precision 'fp4' is unknown"):
        load_teacher(teacher, student, "fp4")  # type: ignore[arg-type]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(teacher)
    with pytest.raises(TrainError, match=r"only 260 tokens .* \(261 tokens\) and in .* \(260\)"):
        load_teacher(teacher, student)
    (teacher / "tokenizer.json").unlink()
    with pytest.raises(TrainError, match=r"no tokenizer.json"):
        load_teacher(teacher, student)
