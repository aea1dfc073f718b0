import io
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tools.base import CallFailed, ToolResult, load
from tools.code import CodeTool, parse

ROOT = Path(__file__).parents[2]
BAR = "plt.bar(['a', 'b', 'c'], [1, 2, 3])\nplt.title('Sales')\nplt.xlabel('product')"


@pytest.fixture(scope="module")
def tool() -> Iterator[CodeTool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_API_KEY", "hunter2")
        tool = CodeTool(timeout_s=10, memory_mib=512)
        yield tool
    tool.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[CodeTool]:
    tool = CodeTool(timeout_s=2)
    yield tool
    tool.close()


@pytest.fixture(scope="module")
def bar(tool: CodeTool) -> ToolResult:
    return run(tool, BAR)


def run(tool: CodeTool, code: str) -> ToolResult:
    return tool.run({"code": code}, ())


def reason(tool: CodeTool, code: str) -> str:
    with pytest.raises(CallFailed) as failed:
        run(tool, code)
    return str(failed.value)


def size(result: ToolResult, index: int = 0) -> tuple[int, int]:
    image = Image.open(io.BytesIO(result.images[index].data))
    image.load()
    return image.size


def zygote(tool: CodeTool) -> psutil.Process:
    running = tool._sandbox._zygote
    assert running is not None
    return psutil.Process(running.process.pid)


def test_a_chart_comes_back_as_one_png_of_the_default_size(bar):
    assert len(bar.images) == 1 and bar.images[0].mime == "image/png"
    assert size(bar) == (345, 230)
    assert bar.provenance == {"maker": "matplotlib", "figures": 1}


def test_the_same_code_gives_the_same_bytes_without_metadata(tool, bar):
    assert run(tool, BAR).images == bar.images
    assert b"tEXt" not in bar.images[0].data
    noise = (
        "plt.plot(np.random.rand(9), np.random.default_rng().random(9))\nsns.lineplot(x=[1, 1, 2, 2], y=[1, 2, 3, 5])"
    )
    noise += "\nimport random\nplt.title(str(random.random()) + str({'x', 'y', 'z'}))"
    assert run(tool, noise).images == run(tool, noise).images


def test_sets_have_the_same_order_in_every_zygote(tool, impatient):
    code = "plt.title(' '.join({'alpha', 'beta', 'gamma', 'delta'}))"
    assert run(tool, code).images == run(impatient, code).images


@pytest.mark.parametrize(
    "code",
    [
        "pd.DataFrame({'a': [1, 3, 2]}).plot(kind='area')",
        "sns.heatmap(np.random.rand(4, 4), annot=True)",
        "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.pie([1, 2])\nplt.show()\nfig.show()",
        "def main():\n    plt.plot([1, 2])\nif __name__ == '__main__':\n    main()",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1\nplt.plot([P().x])",
        "plt.plot([1])\nplt.savefig('chart.png')\nassert plt.imread('chart.png').any()",
        "plt.plot([1])\nplt.savefig('/no/such/folder/chart.png', dpi=300)",
        "plt.plot([1])\nopen('notes.txt', 'w').write('x')\nimport tempfile\ntempfile.TemporaryFile()",
        "plt.plot([1])\nimport sys\nsys.exit()",
        "plt.title('日本語 العربية Привет ελληνικά 😀 \\u200d')",
        "plt.rcParams['font.family'] = 'No Such Font'\nplt.title('x')",
        "plt.plot([float('nan')])",
        "plt.figure()",
        "print('\\ud800')\nplt.plot([1])",
    ],
)
def test_ordinary_code_draws(tool, code):
    assert len(run(tool, code).images) == 1


def test_all_figures_come_back_in_the_order_of_their_numbers(tool):
    result = run(tool, "for n in (3, 1, 2):\n    plt.figure(n, figsize=(n, 1))")
    assert [size(result, i)[0] for i in range(3)] == [72, 144, 216]
    assert result.provenance["figures"] == 3


def test_of_too_many_figures_the_first_ones_come_back(tool):
    result = run(tool, "for n in range(11):\n    plt.figure(figsize=(1, 1))")
    assert len(result.images) == 8 and (result.provenance["figures"], result.provenance["left_out"]) == (8, 3)


def test_labels_beyond_the_edge_are_not_cut_off(tool):
    code = "plt.bar(['a'], [1])\nplt.xticks([0], ['a long label that is turned'], rotation=90)"
    image = Image.open(io.BytesIO(run(tool, code).images[0].data)).convert("L")
    assert image.height > 230
    assert (np.asarray(image)[[0, -1]] == 255).all()
    assert size(run(tool, BAR + "\nplt.text(500, 500, 'far away')")) == (345, 230)


def test_the_dots_per_inch_are_the_tools(tool):
    assert size(run(tool, "plt.figure(figsize=(2, 2), dpi=600)")) == (144, 144)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\ny = 2\nx / 0", "line 3: ZeroDivisionError: division by zero"),
        ("plt.plot([1, 2]", "line 1: SyntaxError: '(' was never closed"),
        ("x = 1\n  y = 2", "line 2: IndentationError: unexpected indent"),
        ("def f():\n    return undefined\n\nf()", "line 2: NameError: name 'undefined' is not defined"),
        ("import numpy as np\nnp.zeros((2, 2)) @ np.zeros(3)", "line 2: ValueError: matmul"),
        ("x = 1\nraise KeyboardInterrupt", "line 2: KeyboardInterrupt"),
        ("raise ValueError('two\\nlines')", "line 1: ValueError: two lines"),
        ("x = '\0'", "line 1: SyntaxError: source code string cannot contain null bytes"),
        ("x = '\ud800'", "line 1: UnicodeEncodeError"),
        ("(" * 5000, "line 1: SyntaxError: too many nested parentheses"),
        ("def f():\n    f()\nf()", "line 2: RecursionError: maximum recursion depth exceeded"),
        ("import sys\nsys.exit('no data')", "line 2: SystemExit: no data"),
        ("class E(Exception):\n    def __str__(self):\n        1 / 0\nraise E", "ended its process"),
        ("input('name?')", "line 1: EOFError"),
        ("plt.title(r'$\\frac{$')", "figure 1 cannot be drawn: ValueError"),
        ("plt.figure(figsize=(5000, 5000))", "figure 1 is 360000 x 360000 pixels: choose a smaller figsize"),
        ("x = 1", "drew no figure"),
        ("", "drew no figure"),
        ("plt.plot([1])\nplt.savefig('a.png')\nplt.close()", "drew no figure, or closed it"),
        ("print('the answer is', 42)", "it printed: the answer is 42"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from tools.base import Tool", "line 1: "),
        ("x = 1\n" * 50_000, "at most 262144 are run"),
    ],
)
def test_code_that_fails_is_told_its_line_and_why(tool, bar, code, expected):
    assert expected in reason(tool, code)
    assert run(tool, BAR).images == bar.images


OUTSIDE_ITS_FOLDER = [
    "open('/etc/passwd')",
    "import os\nopen(f'/proc/{os.getppid()}/environ')",
    "import os\nopen(os.__file__, 'a')",
    "import os\nos.rename('/etc/hostname', 'mine')",
    "open('/mine', 'w')",
]


@pytest.mark.parametrize("code", OUTSIDE_ITS_FOLDER)
def test_files_outside_its_folder_are_out_of_reach(tool, bar, code):
    told = reason(tool, code)
    assert re.search("PermissionError|FileNotFoundError|Read-only file system|Invalid cross-device link", told), told
    assert run(tool, BAR).images == bar.images


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = np.ones(10 * 2**30, dtype=np.uint8)", "line 1: MemoryError"),
        ("x = []\nwhile True:\n    x.append(bytes(2**24))", "line 3: MemoryError (the limit is 512 MiB)"),
        ("open('big', 'wb').write(bytes(100 << 20))", "line 1: OSError: [Errno 27] File too large"),
        ("import os\nos.fork()", "line 2: PermissionError"),
        ("import subprocess\nsubprocess.run(['ls'])", "line 2: PermissionError"),
        ("import os\nos.system('ls') == 0 or 1 / 0", "ZeroDivisionError"),
        ("import os\nos.execv('/bin/ls', ['ls'])", "line 2: PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "line 2: PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "line 2: PermissionError"),
        ("import os\nos.kill(-1, 9)", "line 2: PermissionError"),
        ("import signal\nsignal.raise_signal(signal.SIGKILL)", "line 2: PermissionError"),
        ("import os\nos.chmod(os.__file__, 0)", "line 2: PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "line 2: ValueError"),
        ("import os\nos._exit(3)", "ended its process (exit status 3)"),
        ("import os\nos._exit(0)", "ended its process (exit status 0)"),
        ("import os\nos.abort()", "ended by a signal"),  # the first of a process namespace aborts with another
        ("import ctypes\nctypes.string_at(0)", "ended by a signal (Segmentation fault)"),
        ("import os\nos.closerange(0, 256)\nplt.plot([1])", "ended its process"),
        ("import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'rubbish')\n    except OSError: pass", "channel"),
        ("import os\nos.fchdir(os.open('.', 0))\nos.rmdir(os.getcwd())\nplt.close()", ""),
        ("import sys\nsys.stdout = sys.stderr = None\nplt.close()", "drew no figure"),
        ("plt.plot([1])\nplt.get_fignums = None", "ended its process"),
    ],
)
def test_hostile_code_fails_alone(tool, bar, code, expected):
    assert expected in reason(tool, code)
    assert run(tool, BAR).images == bar.images


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import signal, time\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        "import signal, time\nsignal.raise_signal(signal.SIGSTOP)\ntime.sleep(60)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ntime.sleep(60)",
    ],
)
def test_code_that_does_not_end_is_stopped(impatient, bar, code):
    began = time.monotonic()
    assert reason(impatient, code) == "the code ran longer than 2 s and was stopped"
    assert 2 <= time.monotonic() - began < 10
    assert run(impatient, BAR).images == bar.images


@pytest.mark.parametrize(
    "flood",
    [
        "print('x' * 50_000_000)",
        "import os\nfor _ in range(50): os.write(1, os.urandom(1_000_000))",
        "import sys\nfor _ in range(500): sys.stderr.write('\\x00F\\xff' * 30_000)",
        "import sys\nsys.__stdout__.buffer.write(bytes(10_000_000))",
    ],
)
def test_megabytes_of_output_neither_stall_nor_corrupt_the_figures(tool, bar, flood):
    assert run(tool, f"{flood}\n{BAR}").images == bar.images


def test_too_many_bytes_of_figures_are_refused(tool):
    send = (
        "import gc, socket\nc = next(o for o in gc.get_objects() if isinstance(o, socket.socket) and o.fileno() > 2)\n"
    )
    assert "figures take more than 32 MiB" in reason(tool, send + "while True: c.sendall(bytes(1 << 20))")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


def forged(head: bytes, pixels: bytes, more: bytes = b"") -> bytes:
    """A PNG with this header and these unpacked pixels."""
    body = chunk(b"IDAT", zlib.compress(pixels)) + more + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


RGBA = struct.pack("!IIBBBBB", 2, 3, 8, 6, 0, 0, 0)
PIXELS = bytes(3 * (1 + 2 * 4))


@pytest.mark.parametrize(
    ("png", "why"),
    [
        (forged(RGBA, PIXELS)[:-9], "half a PNG"),
        (forged(RGBA, PIXELS)[:-12], "does not end"),
        (forged(RGBA, PIXELS) + b"<script>", "does not end"),
        (forged(RGBA, PIXELS, chunk(b"tEXt", b"Comment\0<script>")), "more than a picture"),
        (forged(RGBA, PIXELS, chunk(b"acTL", bytes(8))), "more than a picture"),
        (forged(RGBA, PIXELS).replace(b"IDAT", b"IDAU"), "more than a picture"),
        (forged(RGBA, PIXELS[:-1]), "more or fewer pixels"),
        (forged(RGBA, PIXELS + bytes(1 << 24)), "more or fewer pixels"),
        (forged(RGBA[:-1] + b"\1", PIXELS), "more or fewer pixels"),
        (forged(RGBA[:12], PIXELS), "does not end"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", RGBA) + chunk(b"IDAT", b"xx") + chunk(b"IEND", b""), "are broken"),
        (b"GIF89a", "not a PNG"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_figure_is_a_whole_png_of_pixels_and_nothing_else(png: bytes, why: str) -> None:
    good, bad = (struct.pack("!cI", b"F", len(data)) + data for data in (forged(RGBA, PIXELS), png))
    assert len(parse(good).figures) == 1
    with pytest.raises(ValueError, match=why):
        parse(bad)


def test_more_figures_than_allowed_and_an_endless_reason_are_not_passed_on() -> None:
    figure, reason = forged(RGBA, PIXELS), b"pwned " * 100_000
    with pytest.raises(ValueError, match="more than 2 figures"):
        parse(3 * (struct.pack("!cI", b"F", len(figure)) + figure), 2)
    assert len(parse(struct.pack("!cI", b"E", len(reason)) + reason).reason) == 400


def test_a_forged_png_that_claims_to_be_huge_is_refused(tool):
    send = (
        "import gc, socket\nc = next(o for o in gc.get_objects() if isinstance(o, socket.socket) and o.fileno() > 2)\n"
    )
    png = forged(struct.pack("!IIBBBBB", 60000, 60000, 8, 6, 0, 0, 0), b"")
    frames = b"".join(struct.pack("!cI", kind, len(data)) + data for kind, data in ((b"F", png), (b"D", b"1")))
    assert "60000 x 60000 pixels" in reason(tool, send + f"c.sendall({frames!r})\nimport os\nos._exit(0)")


def test_nothing_of_the_environment_reaches_the_code(tool):
    names = reason(tool, "import os\nprint(sorted(os.environ))")
    assert os.environ["SECRET_API_KEY"] and "MPLCONFIGDIR" in names and "SECRET_API_KEY" not in names


def test_each_call_has_an_empty_folder_that_is_deleted(tool):
    for _ in range(2):
        assert reason(tool, "import os\nopen('left', 'w').write('x')\nprint(os.listdir())").endswith("['left']")
    deep = "import os\nfor _ in range(1100):\n    os.mkdir('d')\n    os.chdir('d')"
    assert "drew no figure" in reason(tool, deep)
    assert not list(Path(tool._sandbox._zygote.home, "calls").glob("*/*"))


def test_calls_from_several_threads_run_at_the_same_time(impatient, bar):
    codes = [BAR, "1 / 0", "while True: pass", BAR, "import os\nos._exit(1)", BAR]
    run(impatient, BAR)
    with ThreadPoolExecutor(len(codes)) as pool:
        futures = [pool.submit(run, impatient, code) for code in codes]
    assert all(futures[i].result().images == bar.images for i in (0, 3, 5))
    assert "ZeroDivisionError" in str(futures[1].exception())
    assert "longer than 2 s" in str(futures[2].exception())
    assert "exit status 1" in str(futures[4].exception())


def test_a_dead_zygote_is_infrastructure_and_the_next_call_works(impatient, bar):
    victim = zygote(impatient)
    threading.Timer(0.3, victim.kill).start()
    with pytest.raises(RuntimeError, match="zygote died; the next call starts another"):
        run(impatient, "import time\ntime.sleep(60)")
    assert run(impatient, BAR).images == bar.images
    zygote(impatient).kill()
    zygote(impatient).wait(5)
    assert run(impatient, BAR).images == bar.images


def test_a_zygote_that_cannot_start_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr("tools.sandbox.sys.executable", "/usr/bin/false")
    with pytest.raises(RuntimeError, match="zygote did not start: it said nothing"):
        CodeTool()


def test_the_kernels_out_of_memory_killer_is_infrastructure(tool):
    def kill_child() -> None:
        while not (children := zygote(tool).children()):
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(children[0].pid, signal.SIGKILL)

    threading.Thread(target=kill_child).start()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tool, "import time\ntime.sleep(60)")


def test_closing_leaves_no_process_and_no_folder(bar):
    closing = CodeTool()
    assert run(closing, BAR).images == bar.images
    parent = zygote(closing)
    home = Path(closing._sandbox._zygote.home)  # type: ignore[union-attr]
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(run, closing, "import time\ntime.sleep(60)") for _ in range(2)]
        while len(children := parent.children(recursive=True)) < 2:
            time.sleep(0.01)
        closing.close()
        assert all(isinstance(call.exception(), RuntimeError) for call in calls)
    assert not parent.is_running() and not any(child.is_running() for child in children)
    assert not home.exists()
    with pytest.raises(RuntimeError, match="closed"):
        run(closing, BAR)
    closing.close()


def test_closing_before_the_zygote_is_ready_leaves_nothing():
    hasty = CodeTool()
    running = hasty._sandbox._zygote
    assert running is not None
    hasty.close()
    assert running.process.poll() is not None and not Path(running.home).exists()


def test_a_killed_owner_leaves_no_process_and_no_folder():
    script = """
from tools.code import CodeTool
tool = CodeTool()
running = tool._sandbox._running()
print(running.process.pid, running.home, flush=True)
tool.run({"code": "while True: pass"})
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True) as owner:
        assert owner.stdout is not None
        pid, home = owner.stdout.readline().split()
        parent = psutil.Process(int(pid))
        while not (children := parent.children()):
            time.sleep(0.01)
        owner.kill()
    _, alive = psutil.wait_procs([parent, *children], 10)
    assert not alive and not Path(home).exists()


@given(
    st.lists(st.tuples(st.sampled_from([b"C", b"F", b"E", b"D", b"?"]), st.binary(max_size=40)), max_size=5),
    st.binary(),
)
def test_frames_that_code_forged_are_read_or_refused(frames, rest):
    data = b"".join(struct.pack("!cI", kind, len(payload)) + payload for kind, payload in frames) + rest
    try:
        answer = parse(data)
    except ValueError:
        return
    assert answer.figures == []


def test_the_tool_is_found_by_name():
    assert load("code") is CodeTool and CodeTool.spec.name == "code"


SCRIPTS = {
    "Latin": "Größe, Łódź, Tiếng Việt",
    "Greek": "Ελληνικά",
    "Cyrillic": "Русский, українська",
    "Chinese": "中文图表 繁體",
    "Japanese": "日本語のグラフ",
    "Korean": "한국어 차트",
    "Arabic": "مخطط بياني",
    "Hebrew": "תרשים",
    "Devanagari": "हिन्दी चार्ट",
    "Bengali": "বাংলা",
    "Tamil": "தமிழ்",
    "Thai": "แผนภูมิ",
    "Georgian": "ქართული",
    "Amharic": "አማርኛ",
    "emoji": "😀 🚀",
}


def test_text_in_any_language_has_glyphs(tool):
    """With the fonts that the Makefile installs and tools/fonts.py names."""
    for text in SCRIPTS.values():
        result = run(tool, f"plt.bar([{text!r}, 'b'], [1, 2])\nplt.title({text!r})")
        assert "warnings" not in result.provenance, (text, result.provenance)


def test_a_text_without_glyphs_is_told(tool):
    assert run(tool, "plt.plot([1])\nplt.title('\U00012000')").provenance["warnings"] == [
        "no font here has \U00012000: use other characters"
    ]


def test_an_installation_behind_a_symbolic_link_is_readable(tmp_path: Path) -> None:
    (tmp_path / "venv").symlink_to(sys.prefix)
    call = "t.run({'code': 'plt.plot([1])'})"
    script = f"from tools.code import CodeTool\nt = CodeTool()\nprint(len({call}.images))\nt.close()"
    python = tmp_path / "venv/bin/python"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr
