"""`python -m fused_adamw`: what it prints, and what it says where something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW
from fused_adamw.cli import main


def test_info_names_every_backend_and_version(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("native", "triton", "reference", torch.__version__, "CPU kernels", "CUDA kernels"):
        assert word in out


def test_explain_prints_the_reason_of_a_decision(capsys):
    assert main(["explain", "torch.nn:TransformerEncoderLayer", "norm1.weight"]) != 0  # needs arguments
    assert main(["explain", "tests.test_cli:small_model", "1.weight"]) == 0
    assert "1.weight" in capsys.readouterr().out


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


def model_with_odd_layouts() -> torch.nn.Module:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4).bfloat16()
    )
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 8)[:, ::2])
    return model


def test_info_tells_what_steps_a_model(capsys, monkeypatch):
    pytest.importorskip("fused_adamw._C", exc_type=ImportError)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["info", "--model", "tests.test_cli:model_with_odd_layouts"]) == 0
    out = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")
    ]
    assert ["native", "cpu", "float32", "float32", "float32", "3", "12", "144"] in rows
    assert ["native", "cpu", "bfloat16", "bfloat16", "bfloat16", "2", "20", "120"] in rows
    assert ["reference", "cpu", "any", "any", "any", "1", "16", "192"] in rows
    assert "0.weight is stepped by the reference: parameter is not dense: strides (8, 2)" in out
    assert out.count("is stepped by the reference") == 1


def meta_model() -> torch.nn.Module:
    with torch.device("meta"):
        return small_model()


def test_info_gives_memory_to_a_model_without(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["info", "--model", "tests.test_cli:meta_model"]) == 0
    out = capsys.readouterr().out
    assert "Sequential, one step:" in out
    assert "meta" not in out
    (row,) = [line for line in out.splitlines() if "│ 28 " in line]  # 4 * 4 + 3 * 4 values
    assert " cpu " in row
    assert " 4 " in row


def test_info_does_not_cut_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info", "--model", "tests.test_cli:large_model"]) == 0
    assert "│ 10,000,000 │ 60,000,000 │" in capsys.readouterr().out


def large_model() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Linear(10_000, 1_000, bias=False, dtype=torch.bfloat16)


class Positions(nn.Module):
    """Only a forward pass tells that `p` is a position."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.rand(5, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.p)


class TestInputs:
    def test_sizes(self, capsys):
        for inputs in ("2,5,4", "B=2,T=5,D=4:float32", "x@2,5,4"):
            assert explain("tests.test_cli:Positions", "p", "--inputs", inputs) == 0
            assert "added to every token's activation: a position" in capsys.readouterr().out
        assert explain("tests.test_cli:Positions", "p") == 0
        assert "no rule knows 'p'" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "inputs", [["2,x"], ["2:float31"], ["2:nn"], [""], ["a@2", "3"], ["a@2", "a@3"], ["2", "--no-inputs"]]
    )
    def test_what_is_no_input(self, inputs, capsys):
        assert explain("tests.test_cli:Positions", "--inputs", *inputs[:1], *_more(inputs[1:])) == 2
        assert "--inputs" in capsys.readouterr().err


def _more(inputs):
    return [text for item in inputs for text in ([item] if item[0] == "-" else ["--inputs", item])]


@pytest.mark.parametrize("target", ["nonsense", "torch.nn:Flatten", "torch.nn:Missing"])
def test_info_of_no_model_is_refused(capsys, target):
    assert main(["info", "--model", target]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["unknown"])
    assert "invalid choice" in capsys.readouterr().err


TINY = "tests.test_cli:tiny"


class RMSNorm(nn.Module):
    """A norm that no registry knows."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


THEIRS = """
from torch import nn

def key(): return {}["hidden_size"]
def value(): raise ValueError("bad depth")
def typ(): return nn.Linear(3) + 1
def runtime(): raise RuntimeError("no weights")
def attr(): return nn.foo
def imp():
    import not_a_module_xyz

class hook(nn.Linear):
    def __init__(self): super().__init__(2, 2)
    def parameters(self, recurse=True): raise TypeError("oops")
"""


def leaves():
    sys.exit(0)


def tiny():
    return nn.Sequential(nn.Linear(2, 2), RMSNorm(2))


def explain(*arguments):
    return main(["explain", *arguments])


class TestCommandLine:
    def test_table(self, capsys):
        assert explain(TINY, "--width", "100") == 0
        assert "Sequential, policy hygiene" in capsys.readouterr().out

    def test_diff(self, capsys):
        assert explain(TINY, "--diff", "huggingface") == 0
        assert "Sequential: hygiene and huggingface disagree on 1 of 3 tensors" in capsys.readouterr().out

    def test_json(self, capsys):
        assert explain(TINY, "--json", "--weight-decay", "0.3", "--override", "0.bias=true") == 0
        data = json.loads(capsys.readouterr().out)
        assert [group["params"] for group in data["groups"]] == [2, 1]
        assert data["weight_decay"] == 0.3

    def test_json_of_a_diff(self, capsys):
        assert explain(TINY, "--json", "--diff", "all") == 0
        assert json.loads(capsys.readouterr().out)["policies"] == ["hygiene", "all"]

    def test_sentences(self, capsys):
        assert explain(TINY, "1.weight", "0.weight", "--role", "norm=0.5") == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == (
            "1.weight decays (0.5): 1 is an RMSNorm, built like a norm; roles= says so for norm."
        )
        assert second == "0.weight decays (0.01): 0 is a Linear; matrices decay."

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["resnet50"], "error: target 'resnet50': expected package.module:factory, timm:NAME"),
            (["no.such.module:f"], "error: target 'no.such.module:f': No module named 'no'"),
            (["json:loads2"], "has no attribute 'loads2'"),
            (["os:getcwd"], "error: target 'os:getcwd': expected a torch.nn.Module, got str"),
            ([TINY, "2.weight"], "error: no trainable parameter is called '2.weight'"),
            ([TINY, "--override", "x=1"], "error: override 'x' matches no parameter"),
            ([TINY, "--override", "x=yes"], "error: --override 'x=yes': expected NAME=true"),
            ([TINY, "--role", "x=1"], "error: unknown role 'x'"),
        ],
    )
    def test_errors(self, capsys, arguments, message):
        assert explain(*arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("./model.py:build", "expected a module, not a file; try model:build"),
            ("model.py:build", "expected a module, not a file; try model:build"),
            ("pkg/model.py:build", "expected a module, not a file; try pkg.model:build"),
            ("pkg/model:build", "expected a module, not a file; try pkg.model:build"),
            ("../x:y", "expected a module, not a file; try x:y in the folder that holds it"),
            ("/a/x.py:y", "try a.x:y in the folder that holds it"),
            (".:x", "expected a module, not a file"),
            ("tests.test_cli:tiny.x", "'function' object has no attribute 'x'"),
            ("torch.nn:Linear", "missing 2 required positional arguments"),
            ("tests.test_cli:leaves", "it calls sys.exit(0)"),
        ],
    )
    @pytest.mark.parametrize("command", [["explain"], ["info", "--model"]])
    def test_targets_that_are_none(self, capsys, command, target, message):
        assert main([*command, target]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: target {target!r}: ")
        assert message in err
        assert "Traceback" not in err

    @pytest.mark.parametrize("kind", ["key", "value", "typ", "runtime", "attr", "imp", "hook"])
    @pytest.mark.parametrize("command", [["explain"], ["info", "--model"]])
    def test_errors_of_a_factory_keep_their_traceback(self, capsys, tmp_path, monkeypatch, command, kind):
        (tmp_path / "their_model.py").write_text(THEIRS)
        monkeypatch.syspath_prepend(str(tmp_path))
        assert main([*command, f"their_model:{kind}"]) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert "their_model.py" in err
        assert "fused_adamw/" not in err  # begins where their code does
        assert err.splitlines()[-1].startswith(f"error: target 'their_model:{kind}' raised ")

    @pytest.mark.parametrize(
        "source", ["def build(:", "raise RuntimeError('oops')", "import not_a_module_xyz"]
    )
    def test_errors_of_a_module_keep_their_traceback(self, capsys, tmp_path, monkeypatch, source):
        (tmp_path / "broken_module.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        assert explain("broken_module:build") == 2
        err = capsys.readouterr().err
        assert "broken_module.py" in err
        assert "error: target 'broken_module:build' raised " in err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["0.weight", "--json"], "--json and names of parameters: expected one"),
            (["0.weight", "--diff", "all"], "--diff and names of parameters: expected one"),
            (["0.weight", "--width", "80"], "--width and names of parameters: expected one"),
            (["--json", "--width", "80"], "--json and --width: expected one"),
            (["--lr", "0.1"], "--lr without --layer-decay: expected both"),
            (["--role", "norm=1", "--role", "norm=0"], "--role norm: expected once, got 2 values"),
        ],
    )
    def test_arguments_that_contradict_each_other(self, capsys, arguments, message):
        assert explain(TINY, *arguments) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--lr", "--weight-decay", "--width", "--layer-decay"])
    @pytest.mark.parametrize("value", ["-1", "nan", "inf", "x", "-0.5"])
    def test_numbers_out_of_range(self, capsys, option, value):
        with pytest.raises(SystemExit) as caught:
            explain(TINY, option, value)
        assert caught.value.code == 2
        assert f"argument {option}: expected a " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "value"), [("--width", "0"), ("--layer-decay", "0"), ("--layer-decay", "2")]
    )
    def test_zero_and_two(self, capsys, option, value):
        with pytest.raises(SystemExit):
            explain(TINY, option, value)
        assert f"argument {option}: expected a " in capsys.readouterr().err

    @pytest.mark.slow
    def test_as_a_program(self):
        command = [sys.executable, "-m", "fused_adamw", "explain", "torch.nn:Linear", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "error: target 'torch.nn:Linear'" in done.stderr


class Embedder(nn.Module):
    """A tensor of each kind: coded, exempt, tied, one that no role is for."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(64, 64)
        self.hidden = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 64, bias=False)
        self.lm_head.weight = self.wte.weight


EMBEDDER = "tests.test_cli:Embedder"
FORMATS = ["--dtype", "bfloat16", "--master-weights", "split", "--state-dtype", "8bit"]


class TestFormats:
    def test_without_options_there_is_one_line(self, capsys):
        assert explain(EMBEDDER, "--no-inputs") == 0
        values = 64 * 64 + 64 * 128 + 128 + 64 + 64
        line = f"parameters and moments: {12 * values:,} bytes, 12 per value, without gradients"
        assert capsys.readouterr().out.splitlines()[-1] == line

    def test_the_table_says_what_is_kept_how_and_why(self, capsys):
        assert explain(EMBEDDER, *FORMATS, "--state-role", "norm=float32", "--width", "200") == 0
        rows = {
            line.split()[0]: line.split(None, 4)
            for line in capsys.readouterr().out.splitlines()
            if line.strip()
        }
        assert " ".join(rows["hidden.weight"][2:]).split() == (
            ["matrix", "bfloat16_split", "root_signed", "root_unsigned", "6.125", "state_dtype"]
        )
        assert "bfloat16_split bfloat16 bfloat16_stochastic 8 state_dtype, but 8 bits are not for" in (
            " ".join(" ".join(rows["wte.weight"]).split())
        )
        assert "float32 float32 12 state_roles['norm']" in " ".join(" ".join(rows["norm.weight"]).split())

    def test_sentences(self, capsys):
        assert explain(EMBEDDER, "hidden.weight", "lm_head.weight", "--state-role", "embedding=8bit") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 4
        assert lines[2] == (
            "hidden.weight is kept as float32, exp_avg as float32 and exp_avg_sq as float32, "
            "in 12 bytes per value: as the parameter."
        )
        assert lines[3].startswith("wte.weight is kept as float32, exp_avg as float32")  # it is tied

    @pytest.mark.parametrize("options", [[], FORMATS, ["--state-dtype", "bfloat16"]], ids=str)
    def test_bytes_are_those_of_the_optimizer(self, capsys, options):
        """Of its parameters and state, as they are in memory."""
        assert explain(EMBEDDER, "--json", *options) == 0
        found = json.loads(capsys.readouterr().out)["parameters"]
        chosen = dict(zip(options[::2], options[1::2], strict=True))
        model = Embedder().to(getattr(torch, chosen.get("--dtype", "float32")))
        state_dtype = chosen.get("--state-dtype")
        optimizer = FusedHygieneAdamW(
            model,
            master_weights=chosen.get("--master-weights"),
            state_dtype=torch.bfloat16 if state_dtype == "bfloat16" else state_dtype,
        )
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        params = dict(model.named_parameters())
        for parameter in found:
            p = params[parameter["name"]]
            tensors = [p, *(t for key, t in optimizer.state[p].items() if key != "step")]
            assert parameter["kept"]["bytes"] == sum(t.numel() * t.element_size() for t in tensors)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--state-role", "norm"], "--state-role 'norm': expected ROLE=float32"),
            (["--state-role", "norm=4bit"], "--state-role 'norm=4bit': expected ROLE=float32"),
            (["--state-role", "nom=8bit"], "state_roles['nom'] is no role, and no glob that matches"),
            (
                ["--dtype", "float16", "--master-weights", "split"],
                "is torch.float16: master_weights='split' is for bfloat16",
            ),
            (["--state-dtype", "8bit", "--no-stochastic-rounding"], "does not go with '8bit'"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("command", [["explain"], ["info", "--model"]], ids=str)
    def test_refused(self, capsys, command, options, message):
        assert main([*command, EMBEDDER, *options]) == 2
        assert message in capsys.readouterr().err

    def test_what_does_not_go_together(self, capsys):
        assert explain(EMBEDDER, "--diff", "all", "--state-dtype", "8bit") == 2
        assert "--diff and options about formats: expected one" in capsys.readouterr().err
        assert main(["info", "--state-dtype", "8bit"]) == 2
        assert "options about formats without --model" in capsys.readouterr().err

    def test_info_warns_of_what_the_optimizer_warns_of(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        for options, warns in ((["--dtype", "bfloat16"], True), ([], False)):
            assert main(["info", "--model", EMBEDDER, *options]) == 0
            out = capsys.readouterr().out
            assert ("warning: the second moments of 5 bfloat16 params" in out) == warns
            assert "parameters and moments: " in out
