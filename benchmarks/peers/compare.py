"""Compares the library with PyTorch: scripts/peers calls this program. docs/peers.md describes it."""

import argparse
import array
import dataclasses
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/peers"
VALUES_DIFFER, MISTAKE, NO_PYTORCH = 1, 2, 77
COMPILE_SECONDS = 300  # that torch.compile may take
INSTALL = "python3 -m venv build/torch && build/torch/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu"

# What makes PyTorch's memory faster: freed memory is kept, not returned to the system.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"}


@dataclasses.dataclass
class Case:
    """Something that both programs compute."""

    title: str
    words: dict
    repetitions: int
    goals: tuple = (None, None)  # how many times faster the library is to be: with AVX-512, and without
    budget: float = 1e-5  # of the largest difference, as a share of the largest value


def attention(title, repetitions, goals=(None, None), **words):
    """A case of one kernel."""
    return Case(title, words, repetitions, goals)


def full(passing, tokens, repetitions, goals):
    """Full attention with one head of 128."""
    title = f"SDPA {passing}, D=128, T={tokens}"
    return attention(title, repetitions, goals, case="full", tokens=tokens, heads=1, dim=128, **{"pass": passing})


def gdn(title, passing, tokens, repetitions, goals, **way):
    """Gated DeltaNet with four heads of 128."""
    title = f"chunked GDN {passing}, {title}, 4 heads, D=128, T={tokens}"
    return attention(title, repetitions, goals, case="gdn", tokens=tokens, heads=4, dim=128, **{"pass": passing}, **way)


def dsa(title, passing, repetitions, goals, **way):
    """Sparse attention with eight heads of 64 and 256 keys a query."""
    title = f"DSA {passing}, {title}, 8 heads, D=64, 256 of T=4096 keys"
    return attention(title, repetitions, goals, case="dsa", tokens=4096, heads=8, dim=64, **{"pass": passing}, **way)


def training(vocab, repetitions):
    """A step of training study 1's model."""
    words = {"case": "train", "pass": "step", "tokens": 128, "heads": 2, "dim": vocab}
    return Case(f"training step of study 1, LFFL, 2 x 128 tokens, V={vocab}", words, repetitions, (5, 5), 1e-4)


CASES = {
    "full-forward-1024": full("forward", 1024, 20, (1.8, 1.5)),
    "full-forward-4096": full("forward", 4096, 5, (1.3, 1.15)),
    "full-backward-1024": full("backward", 1024, 10, (1.8, 1.5)),
    "full-backward-4096": full("backward", 4096, 3, (1.3, 1.15)),
    "gdn-rows-512": gdn("as transformers writes it", "forward", 512, 10, (5, 5), way="rows"),
    "gdn-rows-4096": gdn("as transformers writes it", "forward", 4096, 3, (5, 5), way="rows"),
    "gdn-solver-512": gdn("with a triangular solver", "forward", 512, 10, (None, None)),
    "gdn-solver-4096": gdn("with a triangular solver", "forward", 4096, 3, (None, None)),
    "gdn-backward-512": gdn("with a triangular solver", "backward", 512, 5, (None, None)),
    "dsa-mask-4096": dsa("masked dense", "forward", 2, (10, 10)),
    "dsa-blocks-4096": dsa("masked blocks of queries", "forward", 2, (None, None), way="blocks"),
    "dsa-backward-4096": dsa("masked dense", "backward", 2, (None, None)),
    "train-256": training(256, 10),
    "train-49152": training(49152, 5),
}


class Failure(Exception):
    """A sentence, and the exit code that goes with it."""

    def __init__(self, sentence, code=MISTAKE):
        super().__init__(sentence)
        self.code = code


# The command line


def positive(word):
    """A whole number above 0."""
    if not re.fullmatch("[1-9][0-9]{0,5}", word):
        raise argparse.ArgumentTypeError(f"'{word}' is not allowed; it must be a whole number of at least 1")
    return int(word)


def names_of(word):
    """The cases that begin with the words of a list, such as full,train-256."""
    chosen = []
    for part in word.split(","):
        matching = [name for name in CASES if part and (name == part or name.startswith(part + "-"))]
        if not matching:
            raise argparse.ArgumentTypeError(f"'{part}' is no case; there are {', '.join(CASES)}, and the words that they begin with")
        chosen += matching
    return [name for name in CASES if name in chosen]


def parse():
    """The options."""
    parser = argparse.ArgumentParser("peers", description="Compares the library with PyTorch in alternating processes.", allow_abbrev=False)
    parser.add_argument("--rounds", type=positive, metavar="N", help="processes of each program and case (5)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of both programs, each on a core of its own (1)")
    parser.add_argument("--cases", type=names_of, default=list(CASES), metavar="LIST", help="names, or how they begin (all)")
    parser.add_argument("--quick", action="store_true", help="one round, few repetitions, no torch.compile: shows that all works")
    parser.add_argument("--as-installed", action="store_true", help="measures PyTorch without tuning too")
    parser.add_argument("--python", default=default_python(), metavar="FILE", help="a Python that has PyTorch (%(default)s)")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def default_python():
    """The Python of the folder that the sentence about installing names, or this one."""
    installed = ROOT / "build/torch/bin/python"
    return str(installed) if installed.exists() else sys.executable


# The machine


def cpu_info():
    """The first processor's lines of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def has_avx512(info):
    """Whether the CPU has what both programs use of AVX-512."""
    return {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(info.get("flags", "").split())


def tuned_environment(info):
    """The environment of a tuned PyTorch."""
    environment = TUNED | {"TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor")}
    if has_avx512(info):
        environment["ATEN_CPU_CAPABILITY"] = "avx512"
    if info.get("vendor_id") == "AuthenticAMD":
        environment["LD_PRELOAD"] = str(BUILD / "benchmarks/peers/libpeers_intel_cpu.so")
    return environment


def take_cores(count):
    """Binds this process, and those that it starts, to the last cores."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise Failure(f"--threads {count} is not allowed; this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[-count:])


# The programs


def check_pytorch(python):
    """Throws where there is no PyTorch."""
    try:
        found = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    except OSError as error:
        raise Failure(f"--python {python} does not run: {error.strerror}") from error
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(f"{python} has no PyTorch ({reason}); to install it: {INSTALL}", NO_PYTORCH)


def build():
    """Compiles the library's program."""
    ccache = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if any((Path(p) / "ccache").exists() for p in os.get_exec_path()) else []
    for command in (["cmake", "--preset", "peers", *ccache], ["cmake", "--build", "--preset", "peers"]):
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if made.returncode != 0:
            raise Failure(f"'{' '.join(command)}' failed:\n{made.stdout}{made.stderr}")


def call(command, words, environment, seconds=None):
    """What a program prints for these words. It is stopped after some seconds."""
    arguments = [f"{name}={value}" for name, value in words.items()]
    made = subprocess.run([*command, *arguments], env=os.environ | environment, stdout=subprocess.PIPE, text=True, timeout=seconds)
    if made.returncode != 0:
        raise Failure(f"'{' '.join([*command, *arguments])}' ended with {made.returncode}")
    return json.loads(made.stdout.splitlines()[-1])


def choose(python, words, environment, may_compile):
    """The fastest way to write a case in PyTorch, and why other ways do not work. Only the fastest one is compiled."""
    choice = call(python, words | {"variant": "choose"}, environment)
    compiled = choice["variant"] + ", compiled"
    name = f"torch.compile of {words['case']} {words['pass']}, {words['tokens']} tokens"
    if not may_compile:
        return choice
    try:
        with tempfile.NamedTemporaryFile() as file:
            answer = call(python, words | {"variant": compiled, "values": file.name}, environment, COMPILE_SECONDS)
        if statistics.median(answer["seconds"]) < choice["times"][choice["variant"]]:
            choice["variant"] = compiled
    except subprocess.TimeoutExpired:
        choice["failures"][name] = f"not ready after {COMPILE_SECONDS} s"
    except Failure:
        choice["failures"][name] = "see its error above"
    return choice


class Program:
    """One of the programs, and what it measured of a case."""

    def __init__(self, command, words, environment, folder, name):
        self.command, self.environment = command, environment
        self.file = Path(folder) / name
        self.words = words | {"values": self.file}
        self.seconds, self.answers = [], []

    def measure(self):
        """Runs a process."""
        self.answers.append(call(self.command, self.words, self.environment))
        self.seconds += self.answers[-1]["seconds"]

    def values(self):
        """What the last process computed."""
        values = array.array("f")
        values.frombytes(self.file.read_bytes())
        return values

    def median(self):
        """Median of all samples of all processes."""
        return statistics.median(self.seconds)

    def times(self):
        """Minimum and median in milliseconds."""
        return f"{1e3 * min(self.seconds):.4g} / {1e3 * self.median():.4g}"


def difference(ours, theirs, same_size):
    """The largest difference as a share of the largest value; infinite where a number is missing or not finite."""
    if same_size and len(ours) != len(theirs) or not ours or not theirs:
        return math.inf
    largest = max(map(abs, theirs))
    worst = max(abs(x - y) for x, y in zip(ours, theirs))
    finite = math.isfinite(math.fsum(map(abs, ours)) + math.fsum(map(abs, theirs)))
    return worst / largest if finite and largest > 0 else math.inf


@dataclasses.dataclass
class Comparison:
    """The programs that measured a case."""

    case: Case
    choice: dict  # what theirs.py found about the ways to write the case
    ours: Program
    theirs: Program
    installed: Program
    difference: float

    def ratio(self):
        """How many times faster the library is, by the medians."""
        return self.theirs.median() / self.ours.median()

    def best_ratio(self):
        """The same, by the minima: other programs disturb these less."""
        return min(self.theirs.seconds) / min(self.ours.seconds)


def compare(case, options, info, folder):
    """Chooses the fastest way to write a case in PyTorch, then measures both programs by turns."""
    repetitions = 2 if options.quick else case.repetitions
    words = case.words | {"repetitions": repetitions, "threads": options.threads}
    python = [options.python, str(ROOT / "benchmarks/peers/theirs.py")]
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    tuned = tuned_environment(info) | threads
    choice = choose(python, words | {"tuned": "yes"}, tuned, not options.quick)
    ours = Program([str(BUILD / "benchmarks/peers/peers_ours")], words, threads, folder, "ours")
    theirs = Program(python, words | {"tuned": "yes", "variant": choice["variant"]}, tuned, folder, "theirs")
    installed = Program(python, words, threads, folder, "installed")
    for _ in range(options.rounds):
        ours.measure()
        theirs.measure()
        if options.as_installed:
            installed.measure()
    same_size = case.words["case"] != "train"  # of training there are the losses of as many steps as there were
    return Comparison(case, choice, ours, theirs, installed, difference(ours.values(), theirs.values(), same_size))


# What is printed


def judgement(comparison, options, avx512):
    """The goal and, where one core was measured properly, whether it was reached."""
    goal = comparison.case.goals[0 if avx512 else 1]
    if goal is None or options.threads > 1:
        return "-"
    if options.quick:
        return f"{goal:g}"
    return f"{goal:g}: {'reached' if comparison.ratio() >= goal else 'missed'}"


def table(comparisons, options, avx512):
    """A row for each case."""
    yield "| case | ours, ms: min / median | PyTorch | as installed | ratio: medians / minima | goal | difference | PyTorch's way |"
    yield "|---|---|---|---|---|---|---|---|"
    for c in comparisons:
        judged = judgement(c, options, avx512)
        installed = c.installed.times() if c.installed.seconds else "-"
        excess = "" if c.difference <= c.case.budget else f" above {c.case.budget:g}"
        yield (
            f"| {c.case.title} | {c.ours.times()} | {c.theirs.times()} | {installed} | {c.ratio():.2f} / {c.best_ratio():.2f} | {judged} "
            f"| {c.difference:.1e}{excess} | {c.choice['variant']} |"
        )


def losses(comparisons):
    """The losses of the steps that both programs made."""
    for c in comparisons:
        ours, theirs = (program.answers[-1]["losses"] for program in (c.ours, c.theirs))
        steps = min(len(ours), len(theirs))
        if steps == 0:
            continue
        yield f"Losses of {c.case.title}, steps 1, 2, {steps}:"
        for name, values in (("ours", ours), ("PyTorch", theirs)):
            yield f"  {name:8} " + " ".join(f"{values[i]:.6f}" for i in (0, 1, steps - 1))


def circumstances(comparisons, options, info):
    """Versions, machine and flags."""
    ours = [answer for c in comparisons for answer in c.ours.answers]
    theirs = comparisons[0].theirs.answers[0]
    peaks = sorted(answer["peak"] for answer in ours)
    yield f"{info.get('model name', platform.processor() or 'unknown CPU')}, {options.threads} thread(s), {options.rounds} round(s). " + (
        f"FMA peak of a core before our processes: {peaks[0]:.0f} to {peaks[-1]:.0f} GFLOP/s, median {statistics.median(peaks):.0f}."
    )
    yield f"Ours: {ours[0]['compiler']} {ours[0]['flags']}."
    yield f"PyTorch {theirs['version']}, {theirs['vectors']}, Python {platform.python_version()}; tuned: " + ", ".join(
        f"{name}={value}" for name, value in tuned_environment(info).items() if "/" not in value
    ) + (", preloaded: MKL takes the CPU for Intel's" if info.get("vendor_id") == "AuthenticAMD" else "") + ", fused AdamW."
    clock = "CPU time of the process" if options.threads == 1 else "wall time"
    yield f"Times: {clock}. A goal is for the ratio of medians, on one core. Difference: the largest one, as a share of PyTorch's largest value."
    failures = {f"{way}: {reason}" for c in comparisons for way, reason in c.choice["failures"].items()}
    if failures:
        yield f"Ways that do not work here: {'; '.join(sorted(failures))}"
    if options.quick:
        yield "These are the numbers of --quick: they show that everything works, not how fast it is."


def report(comparisons, options, info):
    """Prints all."""
    for part in (table(comparisons, options, has_avx512(info)), losses(comparisons), circumstances(comparisons, options, info)):
        lines = list(part)
        if lines:
            print("\n".join(lines) + "\n")
    sys.stdout.flush()


def run():
    """Does what the command line asks, and returns the exit code."""
    options = parse()
    check_pytorch(options.python)
    print("== building", file=sys.stderr)
    build()
    take_cores(options.threads)
    info = cpu_info()
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(options.cases, 1):
            print(f"== {number} of {len(options.cases)}: {name}", file=sys.stderr)
            comparisons.append(compare(CASES[name], options, info, folder))
    report(comparisons, options, info)
    wrong = [c.case.title for c in comparisons if c.difference > c.case.budget]
    if wrong:
        raise Failure(f"the programs computed different numbers: {'; '.join(wrong)}", VALUES_DIFFER)
    return 0


def main():
    """Turns errors into sentences."""
    try:
        sys.exit(run())
    except Failure as failure:
        print(f"peers: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
