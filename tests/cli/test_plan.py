import json
import subprocess
import sys

import pytest

from helpers import tiny_config

QUICK = ("--no-measure", "--max-seq-len", "32", "--batch-size", "4")


@pytest.fixture(scope="session")
def config_dir(tmp_path_factory):
    """A directory with a config and no weights at all."""
    path = tmp_path_factory.mktemp("config") / "tiny"
    tiny_config(tie_word_embeddings=False).save_pretrained(path)
    return path


def test_a_plan_for_people(lowtide, config_dir):
    result = lowtide("plan", "--model", config_dir, *QUICK, "--dtype", "float32")
    assert (result.code, result.err) == (0, [])
    for words in (
        "This plan",
        "weights",
        "AdamW, mixed precision",
        "LOMO (paper)",
        "Expected time of a step",
    ):
        assert words in result.out
    assert "Weights of model.embed_tokens to lm_head: in memory." in result.out
    assert "(assumed)" in result.out
    assert "to the disk" not in result.out


def test_a_plan_for_a_gpu_that_is_not_here(lowtide, config_dir):
    result = lowtide("plan", "--model", config_dir, *QUICK, "--device", "cuda", "--device-memory", "24GiB")
    assert result.code == 0
    assert "host memory" in result.out


def test_a_plan_as_json(lowtide, config_dir):
    flags = ("--weights", "disk", "--disk", "1GB", "--steps", "10", "--optimizer", "lomo", "--disk-read", "2GB/s")
    result = lowtide("plan", "--model", config_dir / "config.json", *QUICK, *flags, "--json", "-")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["plan"]["homes"] == [[name, "disk"] for name, _ in found["plan"]["homes"]]
    assert found["exact_clipping"]  # lomo clips unless told otherwise
    assert found["disk_bytes_written"] == 11 * found["plan"]["footprint"]["disk"]["weights"]
    assert found["plan"]["speeds"]["disk_read"] == 2e9
    assert found["plan"]["speeds"]["sources"]["disk_read"] == "given"
    assert [method["name"] for method in found["methods"]][-1] == "lowtide lomo, this plan"


def test_files_are_written_and_never_overwritten(lowtide, config_dir, tmp_path):
    files = ("--json", tmp_path / "plan.json", "--plot", tmp_path / "plan.png")
    result = lowtide("plan", "--model", config_dir, *QUICK, *files)
    assert result.code == 0
    assert "This plan" in result.out
    assert json.loads((tmp_path / "plan.json").read_text())["batch_size"] == 4
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    again = lowtide("plan", "--model", config_dir, *QUICK, *files)
    assert again.code == 2
    assert "exists, and nothing is overwritten" in again.err[0]


def test_wear_of_the_disk(lowtide, config_dir):
    result = lowtide("plan", "--model", config_dir, *QUICK, "--weights", "disk", "--disk", "1GB", "--steps", "500")
    assert "Each step writes" in result.out and "a run of 500 steps" in " ".join(result.out.split())


def test_micro_batch_and_clipping_are_taken(lowtide, config_dir):
    flags = ("--micro-batch-size", "2", "--clip-grad-norm", "1", "--json", "-")
    found = json.loads(lowtide("plan", "--model", config_dir, *QUICK, *flags).out)
    assert found["plan"]["micro_batch_size"] == 2
    assert found["exact_clipping"]
    flags = ("--optimizer", "lomo", "--clip-grad-norm", "0", "--json", "-")
    assert not json.loads(lowtide("plan", "--model", config_dir, *QUICK, *flags).out)["exact_clipping"]


GPU = ("--device", "cuda", "--device-memory", "24GiB", "--host-memory", "64GiB")


def test_several_gpus_for_people(lowtide, config_dir):
    result = lowtide("plan", "--model", config_dir, *QUICK, *GPU, "--ranks", "4")
    assert (result.code, result.err) == (0, [])
    for words in (
        "Each of 4 GPUs, at the fullest moment of a step",
        "gathered weights",
        "lowtide adalomo, each of 4",
        "One GPU, and more that share the model and the batch",
        "Between them 24 GB/s each way (that of PCIe, assumed)",
    ):
        assert words in result.out
    last = " ".join(result.out.split("Between them")[1].split())
    assert "as one that holds it whole" in last or "One GPU that holds it whole" in last


def test_several_machines_as_json(lowtide, config_dir):
    flags = (
        "--ranks",
        "4",
        "--ranks-per-node",
        "2",
        "--link-bandwidth",
        "1kB/s",
        "--node-bandwidth",
        "2kB/s",
        "--json",
        "-",
    )
    found = json.loads(lowtide("plan", "--model", config_dir, *QUICK, "--device", "cpu", *flags).out)
    ranks = found["ranks"]
    assert ranks["link"] == {"rank_s": 1000, "node_s": 2000, "source": "given"}
    assert (ranks["num_ranks"], ranks["ranks_per_node"], ranks["reduce_dtype"]) == (4, 2, "float32")
    assert [option["num_ranks"] for option in ranks["options"]] == [1, 2, 4]
    assert [option["bottleneck"] for option in ranks["options"]] == ["compute", "link", "link"]
    assert ranks["better_buy"] == 1 and "One machine" in ranks["sentence"]
    assert found["plan"]["micro_batch_size"] == ranks["options"][0]["micro_batch_size"]
    assert ranks["options"][2]["time"]["reduce_bytes"] > 0
    assert json.loads(lowtide("plan", "--model", config_dir, *QUICK, "--json", "-").out)["ranks"] is None


def test_gpus_that_hold_together_what_one_cannot(lowtide, config_dir, tmp_path):
    flags = ("--ranks", "4", "--device", "cuda", "--host-memory", "0", "--no-mask", "--json", "-")
    large = json.loads((config_dir / "config.json").read_text())
    large.update(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    (tmp_path / "config.json").write_text(json.dumps(large))
    shown = json.loads(lowtide("plan", "--model", tmp_path, *QUICK, *flags, "--device-memory", "1GB").out)["ranks"]
    one, two, four = (option["totals"]["device"] for option in shown["options"])
    assert one > two > four
    between = str((one + two) // 2)
    found = json.loads(lowtide("plan", "--model", tmp_path, *QUICK, *flags, "--device-memory", between).out)
    assert found["plan"] is None and found["ranks"]["options"][0]["footprint"] is None
    assert "cannot train this at all" in found["ranks"]["sentence"]
    people = (*flags[:-2], "--device-memory", between, "--plot", tmp_path / "plan.png")
    result = lowtide("plan", "--model", tmp_path, *QUICK, *people)
    assert result.code == 0 and "Methods compared" in result.out and "cannot train this at all" in result.out
    assert (tmp_path / "plan.png").is_file()
    result = lowtide("plan", "--model", tmp_path, *QUICK, *flags, "--device-memory", "1MB")
    assert result.code == 1 and "no plan fits: each of 4 would take" in result.err[0]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--model", "no/such/dir/here"), 2, "does not exist"),
        (("--max-seq-len", "1"), 2, "expected a whole number of at least 2, got '1'"),
        (("--batch-size", "x"), 2, "expected a whole number of at least 1, got 'x'"),
        (("--device-memory", "much"), 2, "'much' is not a number of bytes"),
        (("--pcie", "fast"), 2, "'fast' is not a rate; write it like 12GB/s"),
        (("--flops", "-1"), 2, "expected operations a second, as 35T or 80G, got '-1'"),
        (("--micro-batch-size", "5"), 2, "--micro-batch-size must not be larger than --batch-size (4)"),
        (("--rounding", "compensated", "--dtype", "float32"), 2, "--rounding compensated is for 16-bit weights"),
        (("--device", "tpu"), 2, "--device must be auto, cpu, cuda or cuda:N, got tpu"),
        (("--device-memory", "10kB"), 1, "no plan fits"),
        (("--directory", "nowhere"), 2, "--directory nowhere is not a directory"),
        (("--ranks", "1"), 2, "expected a whole number of at least 2, got '1'"),
        (("--ranks", "8"), 2, "--batch-size is that of all ranks together, and 4 cannot be shared by 8"),
        (("--ranks", "4", "--ranks-per-node", "3"), 2, "--ranks 4 cannot be divided into groups of --ranks-per-node 3"),
        (("--ranks", "4", "--node-bandwidth", "1GB/s"), 2, "--node-bandwidth is between groups, and there is one"),
        (("--ranks", "4", "--keep-activations", "2"), 2, "--keep-activations is for one process"),
        (("--link-bandwidth", "1GB/s"), 2, "--link-bandwidth means nothing without --ranks"),
        (("--ranks", "4", "--link-bandwidth", "fast"), 2, "'fast' is not a rate; write it like 12GB/s"),
    ],
)
def test_what_is_wrong_is_one_line(lowtide, config_dir, flags, code, words):
    result = lowtide("plan", "--model", config_dir, *QUICK, *flags)
    assert result.code == code
    assert result.out == ""
    assert len(result.err) == 1 and words in result.err[0]


def test_a_gpu_that_is_not_here_needs_its_memory(lowtide, config_dir):
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    result = lowtide("plan", "--model", config_dir, *QUICK, "--device", "cuda")
    assert result.code == 2
    assert "--device-memory 24GiB" in result.err[0]


def test_help_does_not_wait_for_torch():
    script = (
        "import sys\nfrom lowtide.cli import main\n"
        "try:\n    main(['plan', '--help'])\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--device-memory" in done.stdout
