from glasstune.reports.merge_text import merge_lines

RECORD = {
    "passed": True, "gate": "merge_kl_mean", "max_kl": 0.001, "merge_kl_mean": 1.5e-6,
    "merge_kl_max": 2e-5, "merge_max_logit_difference": 0.02, "token_agreement": 0.995,
    "greedy_agreement": 1.0, "rounding_kl_mean": 1.2e-5, "base_kl_mean": 0.0123,
    "prompts": {"held_out": 6, "generic": 14, "tokens": 1005, "greedy_tokens": 8},
    "base": {"path": "base", "precision": "4 bit (nf4), bfloat16"}, "onto": "original",
    "dtype": "bfloat16", "adapter": {"path": "run/adapter"},
    "weights": {"changed": 1400, "copied": 7, "bytes": 16_060_522_496}, "tied": "untied",
    "output": "out", "seconds": {"merge": 3.2, "certificate": 125.0},
    "peak_memory_bytes": 1_500_000_000,
    "readers": {
        "peft": {"accepts": True, "reasons": []},
        "vllm": {"accepts": False, "reasons": ["DoRA is not supported", "other"]},
    },
}  # fmt: skip


def test_the_numbers_and_what_they_mean():
    text = "\n".join(merge_lines(RECORD))
    for part in (
        "merged run/adapter", "original weights: base", "1,400 tensors changed, 7 copied, 16.06 GB",
        "two weights now", "passed, merge_kl_mean 1.5e-06 <= 0.001", "6 held-out rows and 14",
        "same most likely token: 99.50%", "bfloat16 moves it by 1.2e-05", "costs 0.0123",
        "no gate", "peft       accepts it", "vllm       does not: DoRA is not supported; other",
        "merge 3.2 s + certificate 2 min 05 s, peak memory 1.50 GB",
    ):  # fmt: skip
        assert part in text, part


def test_failed_unmeasured_and_training():
    failed = {**RECORD, "passed": False, "merge_kl_mean": 0.5}
    assert "certificate: FAILED, merge_kl_mean 0.5 > 0.001" in merge_lines(failed)
    nan = {**RECORD, "passed": False, "merge_kl_mean": None}
    assert "FAILED, merge_kl_mean not a number" in "\n".join(merge_lines(nan))
    unmeasured = {**RECORD, "passed": None, "merge_kl_mean": None}
    assert "certificate: not measured (--no-certificate)" in merge_lines(unmeasured)
    training = {**RECORD, "onto": "training", "rounding_kl_mean": None, "base_kl_mean": None}
    text = "\n".join(merge_lines(training))
    assert "as training had it (4 bit (nf4), bfloat16)" in text
    assert "costs" not in text
