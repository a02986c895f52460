"""The report, the diff, the remarks and the command line."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_adamw.groups
from fused_adamw.groups import ParamGroupWarning, build_param_groups, explain_param_groups

from .models import GPT2, ResNet50, on_meta


@pytest.fixture(scope="module")
def report():
    return explain_param_groups(on_meta(GPT2), 0.1)


INDICES = torch.tensor([0, 1])


class TestSentences:
    def test_norm(self, report):
        assert report["transformer.ln_f.weight"] == (
            "transformer.ln_f.weight does not decay: transformer.ln_f is a LayerNorm; decay would pull a "
            "norm's gain to zero, not to one."
        )

    def test_matrix(self, report):
        assert report["transformer.h.0.attn.c_attn.weight"] == (
            "transformer.h.0.attn.c_attn.weight decays (0.1): transformer.h.0.attn.c_attn is a Conv1D; "
            "matrices decay."
        )

    def test_tied(self, report):
        assert report["lm_head.weight"] == report["transformer.wte.weight"]
        assert report["lm_head.weight"].startswith(
            "transformer.wte.weight, shared with lm_head.weight, does not decay: an embedding and a head "
        )

    def test_unknown_name(self, report):
        with pytest.raises(KeyError, match="no trainable parameter is called 'ln_f'"):
            report["ln_f"]
        with pytest.raises(KeyError, match=r"did you mean 'transformer.ln_f.weight'"):
            report["transformer.ln_f.wieght"]

    def test_confidence_is_said(self):
        model = nn.Module()
        model.zeta = nn.Parameter(torch.ones(2, 3))
        assert explain_param_groups(model)["zeta"] == (
            "zeta decays (0.01): no rule knows 'zeta' of Module, and its shape (2, 3) may be a matrix; what "
            "is not recognised decays [low confidence]."
        )


class TestTable:
    def test_repeated_layers_are_folded(self, report):
        text = str(report)
        assert "GPT2, policy hygiene" in text
        assert "transformer.h.[0-11].attn.c_attn.weight ×12" in text
        assert "transformer.wte.weight = lm_head.weight" in text
        assert (
            "decay: 48 params, 84,934,656 values; no_decay: 100 params, 39,505,152 values; 2 groups" in text
        )
        assert len(text.splitlines()) < 30

    def test_every_tensor_is_counted_once(self):
        for factory in (GPT2, ResNet50):
            report = explain_param_groups(on_meta(factory))
            from fused_adamw.groups.render import fold

            folds = fold(report.decisions, lambda d: (d.decays, d.role))
            assert sorted(d.name for rows in folds for d in rows) == sorted(d.name for d in report.decisions)

    def test_layers_that_differ_are_not_folded_together(self):
        model = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(4)])
        text = str(explain_param_groups(model, 0.1, overrides={"2.weight": 0.0}))
        assert "[0-1,3].weight ×3" in text
        assert "override '2.weight' sets weight_decay=0.0" in text

    def test_many_runs_of_layers_are_shortened(self):
        model = nn.ModuleList(nn.Linear(2, 2, bias=i % 3 == 0) for i in range(15))
        text = str(explain_param_groups(model))
        assert "[0…12].bias ×5" in text
        assert "[0-14].weight ×15" in text

    def test_varying_sizes_are_dots(self):
        assert "64×·×1×1" in str(explain_param_groups(on_meta(ResNet50)))

    def test_scaled_learning_rates_are_shown(self):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(3)))
        text = str(explain_param_groups(model, 0.1, layer_decay=0.5, lr=1.0))
        assert "lr scale" in text
        assert "0.25–1" in text

    def test_rich_can_print_it(self, report):
        import io

        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, force_terminal=True)
        console.print(report)
        console.print(report.diff("all"))
        assert "\x1b[" in console.file.getvalue()


class TestJSON:
    def test_document(self, report):
        data = json.loads(report.to_json())
        assert (data["model"], data["policy"], data["weight_decay"]) == ("GPT2", "hygiene", 0.1)
        assert data["groups"] == [
            {"params": 48, "values": 84_934_656, "weight_decay": 0.1},
            {"params": 100, "values": 39_505_152, "weight_decay": 0.0},
        ]
        assert len(data["parameters"]) == 148
        assert data["lint"] == []
        assert data["parameters"][0] == {
            "name": "transformer.wte.weight",
            "aliases": ["lm_head.weight"],
            "shape": [50257, 768],
            "dtype": "float32",
            "owner": "Embedding",
            "owner_name": "transformer.wte",
            "role": "tied_embedding",
            "decays": False,
            "options": {"weight_decay": 0.0},
            "lr_scale": 1.0,
            "layer": None,
            "rule": "type",
            "evidence": data["parameters"][0]["evidence"],
            "confidence": "high",
        }

    def test_values_that_json_does_not_know(self):
        overrides = {"weight": {"lr": torch.tensor(0.5), "betas": (0.9, 0.99), "other": torch.float32}}
        data = json.loads(explain_param_groups(nn.Linear(2, 2), overrides=overrides).to_json())
        options = data["parameters"][0]["options"]
        assert options == {"weight_decay": 0.01, "lr": 0.5, "betas": [0.9, 0.99], "other": "torch.float32"}


class TestDiff:
    def test_huggingface(self, report):
        diff = report.diff("huggingface")
        assert diff.names == ["transformer.wte.weight", "transformer.wpe.weight"]
        assert len(diff) == 2
        text = str(diff)
        assert "GPT2: hygiene and huggingface disagree on 2 of 148 tensors" in text
        assert "no pattern matches" in " ".join(text.split())

    def test_same_policy(self, report):
        assert str(report.diff("hygiene")) == "GPT2: hygiene and hygiene disagree on 0 of 148 tensors"

    def test_json(self, report):
        data = json.loads(report.diff("all").to_json())
        assert data["policies"] == ["hygiene", "all"]
        assert len(data["parameters"]) == 100
        assert data["parameters"][0]["decays"] == [False, True]


class TestLint:
    def codes(self, model, **kwargs):
        return {remark.code: remark for remark in explain_param_groups(model, 0.1, **kwargs).lints}

    def test_clean(self, report):
        assert report.lints == []

    def test_norm_decays_under_another_policy(self):
        remark = self.codes(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), policy="huggingface")[
            "norm-decays"
        ]
        assert (remark.level, remark.names) == ("warning", ("1.weight",))

    def test_a_copied_policy_is_taken_as_meant(self, recwarn):
        build_param_groups(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), policy="huggingface")
        assert not [w for w in recwarn if issubclass(w.category, ParamGroupWarning)]

    def test_something_that_sounds_like_a_norm_decays(self):
        class StrangeNorm(nn.Module):
            def __init__(self):
                super().__init__()
                self.mixing = nn.Parameter(torch.ones(3, 4))

        model = nn.Sequential(StrangeNorm())
        with pytest.warns(ParamGroupWarning, match=r"a norm decays: 0\.mixing"):
            build_param_groups(model)

    def test_matrix_exempt_is_a_note(self):
        remark = self.codes(nn.Linear(2, 2), overrides={"weight": 0.0})["matrix-exempt"]
        assert (remark.level, remark.names) == ("note", ("weight",))

    def test_low_confidence(self):
        model = nn.Module()
        model.zeta = nn.Parameter(torch.ones(2, 3))
        with pytest.warns(
            ParamGroupWarning, match="not recognised, decided with low confidence: zeta"
        ) as caught:
            build_param_groups(model)
        assert caught[0].filename == __file__
        assert "low-confidence" not in self.codes(model, overrides={"zeta": True})

    @pytest.mark.parametrize(
        "rebuild",
        [
            torch.jit.script,
            lambda model: torch.jit.trace(model, INDICES),
            lambda model: torch.export.export(model, (INDICES,)).module(),
            lambda model: torch.export.unflatten(torch.export.export(model, (INDICES,))),
        ],
        ids=["script", "trace", "export", "unflatten"],
    )
    @pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:`isinstance.treespec")
    def test_types_that_are_lost(self, rebuild):
        """Without them an embedding decays."""
        model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        assert "lost-types" not in self.codes(torch.fx.symbolic_trace(model))  # keeps them
        rebuilt = rebuild(model)
        remark = self.codes(rebuilt)["lost-types"]
        assert (remark.level, remark.names) == ("warning", ("0.weight", "2.weight"))
        assert "lost-types" not in self.codes(rebuilt, overrides={"*": False})

    def test_aliases_disagree(self):
        model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
        model[1].bias = None
        model[1].weight = model[0].weight
        remark = self.codes(model)["aliases-disagree"]
        assert (remark.level, remark.names) == ("warning", ("0.weight",))

    def test_embedding_tied_to_a_head_is_no_disagreement(self, report):
        assert "aliases-disagree" not in {remark.code for remark in report.lints}

    def test_parameter_in_no_group(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = torch.optim.AdamW(build_param_groups(model[0]))
        remark = self.codes(model, groups=optimizer.param_groups)["not-in-a-group"]
        assert (remark.level, remark.names) == ("warning", ("1.weight", "1.bias"))

    @pytest.mark.parametrize("shape", ["as built", "one group", "single tensors"])
    def test_groups_in_use_that_decay_what_is_exempt(self, shape):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        groups = build_param_groups(model, 0.1)
        if shape == "as built":
            groups[1]["weight_decay"] = 0.01  # as a load of torch's own checkpoint leaves it
        elif shape == "one group":
            groups = [{"params": list(model.parameters()), "weight_decay": 0.01}]
        else:
            groups = [{"params": p, "weight_decay": 0.01} for p in model.parameters()]
        report = explain_param_groups(model, 0.1, groups=groups)
        (remark,) = report.lints
        assert (remark.code, remark.level) == ("decays-in-its-group", "warning")
        assert remark.names == ("0.bias", "1.weight", "1.bias")
        assert "exempt, but the group in use decays: 0.bias" in str(report)
        assert report.to_dict()["lint"][0]["code"] == "decays-in-its-group"

    def test_groups_in_use_that_exempt_what_decays(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        groups = build_param_groups(model, 0.0)
        remark = self.codes(model, groups=groups)["exempt-in-its-group"]
        assert (remark.level, remark.names) == ("warning", ("0.weight",))
        assert explain_param_groups(model, 0.0, groups=groups).lints == []

    def test_too_many_groups(self):
        model = nn.ParameterList(nn.Parameter(torch.ones(2, 2)) for _ in range(100))
        overrides = {str(i): {"weight_decay": i / 1000 + 0.001} for i in range(100)}
        with pytest.warns(ParamGroupWarning, match="100 groups: many optimizers launch kernels per group"):
            groups = build_param_groups(model, overrides=overrides)
        assert len(groups) == 100

    def test_long_lists_are_cut(self):
        model = nn.ModuleList(nn.ModuleList() for _ in range(11))
        for module in model:
            module.zeta = nn.Parameter(torch.ones(2, 3))
        assert "6.zeta, 7.zeta and 3 more" in str(self.codes(model)["low-confidence"])

    def test_doubtful_parameters_are_listed_by_role(self):
        model = nn.ModuleList(nn.ModuleList() for _ in range(10))
        for module in model:
            module.zeta = nn.Parameter(torch.ones(2, 3))
            module.row = nn.Parameter(torch.ones(1, 3))
        with pytest.warns(ParamGroupWarning) as caught:
            build_param_groups(model)
        (text,) = [str(w.message) for w in caught]
        zetas, rows = (", ".join(f"{i}.{name}" for i in range(8)) for name in ("zeta", "row"))
        assert f"low confidence: unknown: {zetas} and 2 more; vector: {rows} and 2 more." in text


def test_groups_is_a_leaf():
    """Torch and the standard library at import; rich only where tables are drawn, and imported late."""
    package = Path(fused_adamw.groups.__file__).parent
    allowed = {"torch", *sys.stdlib_module_names}
    for path in package.glob("*.py"):
        drawing = {"rich"} if path.name == "render.py" else set()
        tree = ast.parse(path.read_text())
        imported = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        imported += [node.module for node in froms if node.level == 0]
        assert {name.partition(".")[0] for name in imported} <= allowed | drawing, path.name
        siblings = {node.module for node in froms if node.level}
        assert all(node.level <= 1 for node in froms), path.name
        assert "render" not in siblings, path.name


def test_no_circle_among_the_files_of_groups():
    """Imports inside functions and for types count too."""
    package = Path(fused_adamw.groups.__file__).parent
    imports = {
        path.stem: {
            node.module or alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1
            for alias in node.names
        }
        for path in package.glob("*.py")
    }
    while ready := {name for name, needs in imports.items() if not needs & set(imports)}:
        imports = {name: needs for name, needs in imports.items() if name not in ready}
    assert not imports
