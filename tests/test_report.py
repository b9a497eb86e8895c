"""The report: one HTML file that needs nothing else, says what the run folders say, and opens in a real browser."""

import base64
import csv
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from agents.report import page
from agents.report_data import grouped, read_run

ROOT = Path(__file__).parent.parent
PROMPTS = ["a cat", "a <dog> & friends"]
COLOURS = [(200, 30, 30), (30, 30, 200)]


def write_run(folder, *, seed=0, learning_rate=1e-3, gain=1.0, alarm_at=None, output="runs/ppo"):
    """A run folder of five evaluations, made up, sample images of one colour each, growing darker."""
    (folder / "samples").mkdir(parents=True)
    config = {
        "seed": seed,
        "output": output,
        "sampling": {"images_per_iteration": 64},
        "training": {"learning_rate": learning_rate},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples" / "prompts.json").write_text(json.dumps(PROMPTS))
    rows = []
    for n in range(5):
        row = {"iteration": 12 * n, "reward": 2 + gain * n / 4, "reward_error": 0.1}
        row |= {"held_out_prompt_fidelity": -2.3 - 0.1 * n, "held_out_prompt_fidelity_error": 0.2}
        row |= {"diversity": 640 - 60 * n, "moved": 150.0 * n, "kl": 5000.0 * n, "kl_error": 100.0 * n}
        rows.append(row | {"alarms": float(12 * n == alarm_at), "kept": float(n == 2)})
        strip = Image.new("RGB", (128, 64))
        for k, colour in enumerate(COLOURS):
            strip.paste(tuple(max(0, value - 20 * n) for value in colour), (64 * k, 0, 64 * k + 64, 64))
        strip.save(folder / "samples" / f"{12 * n:06d}.png")
    with (folder / "evaluations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


class Page(HTMLParser):
    """Tags, images by description, and text of a page; every tag that is opened must be closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.text, self.links, self._open = [], [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [value for key, value in attributes.items() if key in ("src", "href", "srcset", "data", "action")]
        if tag == "img":
            self.images.append((attributes["alt"], attributes["src"]))
        if tag not in ("img", "meta", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", alarm_at=48)


@pytest.fixture
def several(tmp_path):
    return [
        write_run(tmp_path / "ppo", seed=0),
        write_run(tmp_path / "ppo-2", seed=1, gain=1.4),
        write_run(tmp_path / "nabla", seed=0, learning_rate=5e-4, gain=0.5, output="runs/nabla"),
    ]


def content(source):
    kind, data = source.removeprefix("data:image/").split(";base64,")
    return kind, base64.b64decode(data)


def test_the_page_needs_nothing_else(run, several):
    for paths in ([run], several):
        found = Page(page(paths))
        assert not {"script", "link", "iframe", "object"} & set(found.tags)
        assert found.links
        assert all(link.startswith("data:image/") for link in found.links)
        assert "url(" not in page(paths).split("</style>")[0]
        for description, source in found.images:
            kind, data = content(source)
            assert description
            if kind == "png":
                assert Image.open(io.BytesIO(data)).size == (64, 64)
            else:
                assert ElementTree.fromstring(data).tag.endswith("svg")


def test_a_run_is_told(run):
    found = Page(page([run]))
    text = " ".join(found.text)
    assert "alarm at iteration 48" in text
    assert "kept (24)" in text
    assert "2 ±\u00a00.1" in text
    assert "3 ±\u00a00.1" in text
    assert "training.learning_rate" in text
    titles = [description for description, source in found.images if "svg" in source]
    assert "reward, trained on" in titles
    assert "held out: prompt fidelity, against the reward" in titles
    assert len(titles) == 5 + 2


def test_pictures_are_of_their_prompt_and_time(run):
    tiles = {description: content(source)[1] for description, source in Page(page([run])).images if "png" in source}
    assert list(tiles) == [f"{p}, {t}" for p in PROMPTS for t in ("pretrained", "12", "24", "36", "48")]
    for k, prompt in enumerate(PROMPTS):
        for n, time in enumerate(("pretrained", "12", "24", "36", "48")):
            colour = Image.open(io.BytesIO(tiles[f"{prompt}, {time}"])).getpixel((32, 32))
            assert colour == tuple(max(0, value - 20 * n) for value in COLOURS[k])


def test_a_comparison_tells_what_differs(several):
    found = Page(page(several))
    text = " ".join(found.text)
    assert "training.learning_rate" in text
    assert "sampling.images_per_iteration" not in text
    assert "lowest to the highest seed" in text
    tiles = [description for description, source in found.images if "png" in source]
    assert tiles[:4] == [f"a cat, {name}" for name in ("pretrained", "ppo", "ppo-2", "nabla")]


def test_seeds_are_grouped(several):
    groups = grouped([read_run(path) for path in several])
    assert [[run.name for run in group.runs] for group in groups] == [["ppo", "ppo-2"], ["nabla"]]
    assert [group.label for group in groups] == ["ppo, learning_rate=0.001", "nabla, learning_rate=0.0005"]


def test_output_folders_named_by_the_seed_are_one(tmp_path):
    outputs = {"runs/draft-1-0": 0, "runs/draft-1-1": 1, "runs/ppo_seed0": 0, "runs/ppo_seed1": 1, "runs/sf-1": 0}
    runs = [write_run(tmp_path / Path(name).name, seed=seed, output=name) for name, seed in outputs.items()]
    groups = grouped([read_run(path) for path in runs])
    assert [group.label for group in groups] == ["draft-1", "ppo", "sf-1"]
    assert [len(group.runs) for group in groups] == [2, 2, 1]


def test_the_band_spans_the_seeds(several, monkeypatch):
    from matplotlib.axes import Axes

    from agents.report_figures import curve

    drawn = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: drawn.append((x, low, high)))
    curve(grouped([read_run(path) for path in several]), "reward", "reward")
    (steps, low, high), (_, alone_low, alone_high) = drawn
    assert steps == [0, 768, 1536, 2304, 3072]
    assert low == pytest.approx([2, 2.25, 2.5, 2.75, 3])
    assert high == pytest.approx([2, 2.35, 2.7, 3.05, 3.4])
    assert alone_low == pytest.approx([1.9, 2.025, 2.15, 2.275, 2.4])
    assert alone_high == pytest.approx([2.1, 2.225, 2.35, 2.475, 2.6])


def test_it_is_written_from_the_command_line(run, tmp_path):
    command = [sys.executable, "-m", "agents.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == page([run])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        page([tmp_path])
    with pytest.raises(ValueError, match="no run was given"):
        page([])


# Loads the report at a phone's and at a desk's width and writes what it finds into its own document.
HARNESS = """<!DOCTYPE html><body><pre id="found"></pre><script>
const found = [], errors = [];
for (const width of [390, 1280]) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {src: "report.html", width, height: 2000});
  frame.onload = () => {
    const page = frame.contentDocument, pictures = [...page.images];
    found.push({width, needed: page.documentElement.scrollWidth, pictures: pictures.length,
      broken: pictures.filter(picture => !picture.complete || !picture.naturalWidth).length,
      cut: [...page.querySelectorAll(".outcome .scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
      smallest: Math.min(...pictures.map(picture => picture.getBoundingClientRect().width)),
      letters: Math.min(...[...page.querySelectorAll("p, td, figcaption, .tiles div")].map(
        text => parseFloat(frame.contentWindow.getComputedStyle(text).fontSize)))});
    if (found.length == 2) document.getElementById("found").textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script>"""


@pytest.mark.long
@pytest.mark.parametrize("comparison", [False, True])
def test_it_opens_in_a_real_browser(run, several, comparison, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on the path; install it with `apt-get install chromium`")
    text = page(several if comparison else [run])
    (tmp_path / "report.html").write_text(text)
    (tmp_path / "harness.html").write_text(HARNESS)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--enable-logging=stderr"]
    command += ["--dump-dom", f"file://{tmp_path / 'harness.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr[-3000:]
    for found in json.loads(done.stdout.split('id="found">')[1].split("</pre>")[0]):
        assert found["needed"] <= found["width"]  # nothing to scroll sideways but tables in their own boxes
        assert found["cut"] == 0
        assert found["pictures"] == text.count("<img")
        assert found["broken"] == 0
        assert found["smallest"] >= 48
        assert found["letters"] >= 10
