"""What benchmarks/train_vs_diffusers.py reports: how steps are timed, ratios, the chart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import train_vs_diffusers as benchmark

CASE = benchmark.Case("mid", 128, rounds=2, num_warmup_steps=2, num_timed_steps=3)
RUNS = {
    "script": [{"seconds_per_step": 3.0, "peak_mib": 100.0}, {"seconds_per_step": 8.0, "peak_mib": 100.0}],
    "stage": [{"seconds_per_step": 2.0, "peak_mib": 50.0}, {"seconds_per_step": 4.0, "peak_mib": 80.0}],
    "bare": [{"seconds_per_step": 1.6, "peak_mib": 40.0}, {"seconds_per_step": 4.0, "peak_mib": 40.0}],
    "dataloader_num_workers": 0,
    "seconds_by_workers": {},
}
FLOPS = {"unet_forward_backward": 2e12, "vae_encode": 1e12, "text_encoder": 1e10}
PROGRAM = """
import torch
weight = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.{optimizer}([weight])
for _ in range(3):
    weight.grad = torch.ones(1)
    optimizer.step()
"""


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_probe_times_the_steps_of_a_program_that_knows_nothing_of_it(tmp_path, optimizer):
    times = tmp_path / "times.json"
    variables = {"STEP_TIMES": str(times), "STEP_TIMES_SYNC": "1,3", "PYTHONPATH": str(benchmark.PROBE)}
    program = PROGRAM.format(optimizer=optimizer)
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | variables)
    found = json.loads(times.read_text())
    assert len(found["times"]) == 3 and found["times"] == sorted(found["times"])
    assert found["peak_gpu_bytes"] is None or found["peak_gpu_bytes"] >= 0


def test_steps_of_the_warm_up_do_not_count():
    times = [10.0, 15.0, 16.0, 18.0, 21.0]
    resident = [(9.0, 7 << 20), (15.5, 3 << 20), (22.0, 5 << 20)]
    assert benchmark.run_figures(times, resident, None, CASE) == {
        "seconds_per_step": 2.0,
        "median_seconds_per_step": 2.0,
        "peak_mib": 7.0,
        "training_peak_mib": 3.0,
    }


def test_a_run_that_stopped_early_is_no_result():
    with pytest.raises(SystemExit, match="expected 5 optimizer steps, got 4"):
        benchmark.run_figures([1.0, 2.0, 3.0, 4.0], [(1.0, 1)], None, CASE)


def test_ratios_are_of_runs_beside_each_other():
    found = benchmark.summary(RUNS, CASE, FLOPS, encode_seconds=10.0, peak_tflops=790)
    assert found["stage_over_script"] == {"median": 1.75, "rounds": [1.5, 2.0]}
    assert found["step_over_bare_unet"] == {"median": 1.125, "rounds": [1.25, 1.0]}
    assert found["memory_over_script"] == {"median": 0.65, "rounds": [0.5, 0.8]}
    assert found["images_per_second"]["stage"] == pytest.approx(4 / 3, rel=1e-3)  # batch 4, median 3 s
    assert found["break_even_steps"] == 4  # 10 s of encoding, 2.5 s saved a step
    assert "share_of_peak" not in found


def test_share_of_peak_counts_the_unet_alone():
    case = benchmark.Case("sd15", 512, 2, 2, 3, train_batch_size=120)
    found = benchmark.summary(RUNS, case, FLOPS, encode_seconds=10.0, peak_tflops=800)
    assert found["share_of_peak"]["stage"] == pytest.approx(40 * 2e12 / 800e12)


def test_without_the_script_it_says_where_to_get_it(tmp_path):
    with pytest.raises(SystemExit, match=r"curl -LO https://.*/v\d+\.\d+.*/train_text_to_image\.py"):
        benchmark.diffusers_script(tmp_path / "absent.py")


def test_the_mid_size_case_keeps_stable_diffusions_proportions(tmp_path):
    benchmark.write_mid_base(tmp_path)
    flops = benchmark.count_flops(tmp_path, 256)
    # SD 1.5 at 256 pixels: 537 GFLOP, its VAE 0.51 of them, its text encoder 0.025.
    assert flops["vae_encode"] / flops["unet_forward_backward"] == pytest.approx(0.44, abs=0.01)
    assert flops["text_encoder"] / flops["unet_forward_backward"] < 0.03


def test_the_chart_shows_every_case_with_its_ratio():
    found = benchmark.summary(RUNS, CASE, FLOPS, 10.0, 790)
    drawn = benchmark.chart({"mid-128": found, "a<b": found})
    texts = [element.text for element in ElementTree.fromstring(drawn).iter() if element.text]
    assert {"mid-128", "a<b"} <= set(texts)
    assert sum("1.75 times" in text for text in texts) == 2
    assert drawn == benchmark.chart({"mid-128": found, "a<b": found})


def test_cases_measured_earlier_stay(tmp_path):
    found = benchmark.summary(RUNS, CASE, FLOPS, 10.0, 790)
    benchmark.write_results(tmp_path, {"mid-256": found})
    benchmark.write_results(tmp_path, {"mid-128": found})
    assert list(json.loads((tmp_path / "train_vs_diffusers.json").read_text())) == ["mid-128", "mid-256"]
    assert Path(tmp_path / "train_vs_diffusers.svg").is_file()
