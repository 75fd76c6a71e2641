"""Texts of model_new.py beside the one in the working tree: other versions, other architectures,
other plans."""

import ctypes
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def execute(text: str) -> dict:
    """The names that the text defines, made as benchmark harnesses do: without __file__."""
    names: dict = {}
    exec(compile(text, "<string>", "exec"), names)
    return names


def text_of(version: str) -> str:
    """A file's, or a git revision's; LookupError where there is neither."""
    if Path(version).is_file():
        text = Path(version).read_text(errors="replace")
    elif not version or version.startswith((":", "-")):
        text = ""  # git would take it for what is staged, or for an option
    else:
        command = ["git", "-C", ROOT, "show", f"{version}:model_new.py"]
        text = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    if "class ModelNew" not in text:
        raise LookupError(f"--against must be a file or revision with ModelNew, got {version!r}")
    return text


def renamed(text: str, suffix: str) -> str:
    """With another name for extension and operators, so that it can be loaded beside its like."""
    return re.sub(r"""((["']|ops\.)fused_batch_norm)(?=["'.:])""", rf"\1_{suffix}", text)


def sm_80_text(text: str) -> str:
    """What GPUs before sm_90 execute: compiled as far as PTX of compute capability 8.0 only."""
    option = '["-gencode=arch=compute_80,code=compute_80"]'
    text, found = re.subn(r'\[f"-gencode=.*?\]', option, text)
    assert found == 1, f"model_new.py chooses its architecture in {found} places, expected 1"
    return renamed(text, "sm_80")


CONSIDERED = """
struct Considered {
  double cost;
  Plan plan;
};
std::vector<Considered> considered;  // by the planner, since it was last asked
int taken = -1;                      // of them; or what the planner chooses
"""
TAKE_IT = """
template <typename... Ts>
Plan make_plan(const Ts&... arguments) {
  if (taken >= 0) return considered[taken].plan;
  considered.clear();
  return choose_plan(arguments...);
}
"""
SHOW_IT = """
extern "C" int fused_batch_norm_considered() { return int(considered.size()); }
extern "C" double fused_batch_norm_considered_plan(int i, int* words, size_t bytes) {
  memcpy(words, &considered[i].plan, std::min(bytes, sizeof(Plan)));
  return considered[i].cost;
}
extern "C" void fused_batch_norm_take(int i) { taken = i; }
"""


def considering(text: str) -> str:
    """The same with a memory of all plans that Planner::consider gets, each of which can be taken.

    It needs to know three names, Planner::consider, Planner::cost and make_plan. Plans up to twice
    the best's cost are kept, where a bound prunes.
    """
    for pattern, replacement in (
        (r'^(FUSED_BATCH_NORM_CUDA = r""")$', r"\1\n#include <vector>"),
        (r"^struct Planner \{$", CONSIDERED + r"\g<0>"),
        (
            r"^ *void consider\(const std::optional<Plan>& (\w+)\) \{$",
            r"\g<0>\n    if (\1) considered.push_back({cost(*\1), *\1});",
        ),
        (r"^(Plan&? )make_plan(\(.*?\n\}\n)", r"\1choose_plan\2" + TAKE_IT),
        (r'^"""\n\nFUSED_BATCH_NORM_CPP', SHOW_IT + r"\g<0>"),
    ):
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE | re.DOTALL)
        assert found == 1, f"model_new.py has {found} places for {pattern}, expected 1"
    return text.replace("> best_cost) continue;", "> 2 * best_cost) continue;")


def fields_of_plan(cuda: str) -> list[tuple[str, int, str]]:
    """Of the CUDA text's struct Plan: name, place among its words, what the text says of it."""
    struct = re.search(r"struct Plan \{(.*?)\n\};", cuda, re.DOTALL)[1]
    fields, place = [], 0
    field = r"^ *(\w+) ([\w, ]+); *(?:// (.*))?$"  # one without a comment takes its place, too
    for type_, names, why in re.findall(field, struct, re.MULTILINE):
        for name in names.split(", "):
            fields.append((name, place, why))
            place += 3 if type_ == "FastDivmod" else 1  # the divisor, and what replaces it
    return fields


def any_plan_text(text: str) -> str:
    """Whose planner takes some plan that fits instead of the fastest: another for each plan_seed.

    Chains of additions longer than kChain cost digits: taken only where nothing else fits.
    """
    cost = "double cost(const Plan& p) const {\n"
    drawn = """
    uint64_t hash = fused_batch_norm_plan_seed;
    const auto* const words = reinterpret_cast<const unsigned*>(&p);
    for (size_t i = 0; i < sizeof p / 4; ++i) hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15 >> 5;
    return 1e9 + double(hash % 1000003) + (is_nhwc(p.layout) && p.smem_vectors > kChain ? 1e9 : 0);
"""
    assert text.count(cost) == 1 and text.count("if (is_new) kept") == 1
    text = text.replace(cost, cost + drawn).replace("if (is_new) kept", "kept")
    declared = (
        'extern "C" unsigned fused_batch_norm_plan_seed;\nunsigned fused_batch_norm_plan_seed;\n'
    )
    head = 'FUSED_BATCH_NORM_CUDA = r"""\n'
    return renamed(text.replace(head, head + declared), "any_plan")


def plan_seed(names: dict) -> ctypes.c_uint:
    """The variable that chooses the plan, of the names that a text of any_plan_text has made."""
    end = names["_fused_batch_norm"].name + ".so"
    (library,) = (path for path in torch.ops.loaded_libraries if str(path).endswith(end))
    return ctypes.c_uint.in_dll(ctypes.CDLL(library), "fused_batch_norm_plan_seed")
