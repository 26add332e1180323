"""Explorable pictures in a real browser: what they show is what the library computes, by mouse and by keyboard.

Skipped where there is no Chromium; SOFTVQ_BROWSER=required, which CI sets, makes that an error. SOFTVQ_SITE names a
built site to look at in place of a small one with the page of these pictures alone.
"""

import gzip
import json
import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from explore_files import KINDS, pixels_of, read_data
from PIL import Image
from small_site import build_site

from softvq_lib.evaluation.cost import decoding_macs
from softvq_lib.evaluation.generator_cost import generator_config, sampling_macs
from softvq_lib.evaluation.throughput import kl_decoding_macs
from softvq_lib.explorables import unpack
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.tokenizers.quantizer import kl_term
from softvq_lib.tokenizers.softvq import SoftVQ

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Two of the theme's own, which every page has: it declares a name twice, and finds no theme stored at a first visit.
THEMES_OWN = ("THEBE_JS_URL", "Got invalid theme mode")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        reason = f"no browser: none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("SOFTVQ_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*quiet, "--disable-component-update"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    """The page's address as a file: it must work without a server."""
    named = os.environ.get("SOFTVQ_SITE")
    site = Path(named).resolve() if named else build_site(tmp_path_factory.mktemp("site"), ["explore.md"])
    return (site / "explore.html").as_uri()


@pytest.fixture(scope="module")
def opened(browser, address):
    """Opens the page in a context of its own; it notes what was asked for and what went wrong."""
    contexts = []

    def open_page(width=1280, **settings):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **settings))
        page = contexts[-1].new_page()
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        if settings.get("java_script_enabled", True):
            page.wait_for_function(
                "[...document.querySelectorAll('[data-explore]')].every((one) => one.dataset.state === 'ready')"
            )
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(opened):
    return opened()


def part(page, kind):
    return page.locator(f"[data-explore={kind}]")


def shown(picture) -> np.ndarray:
    """Pixels of a canvas, (h, w, 3)."""
    flat = picture.evaluate("(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")
    side = picture.evaluate("(c) => c.width")
    return np.array(flat, dtype=np.uint8).reshape(-1, side, 4)[..., :3]


def choose(root, group, option):
    root.get_by_role("radio", name=option, exact=True).and_(
        root.get_by_role("group", name=group, exact=True).get_by_role("radio")
    ).check(force=True)


def slide(root, label, value):
    root.get_by_role("slider", name=label, exact=True).fill(str(value))


# -- the page as a whole ---------------------------------------------------------------------------------------------


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(opened):
    page = opened()
    assert page.locator("[data-explore]").count() == len(KINDS)
    outside = [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))]
    errors = [error for error in page.errors if not any(known in error for known in THEMES_OWN)]
    assert not outside and not errors


def test_the_page_with_all_that_it_loads_is_below_3_mb(opened):
    """Compressed, as servers send it; the theme's icons alone are half of that otherwise."""
    page = opened()
    files = {Path(unquote(urlparse(url).path)) for url in page.asked if url.startswith("file:")}
    assert {"explore.html", "data_tokens.js"} <= {path.name for path in files}
    assert sum(min(path.stat().st_size, len(gzip.compress(path.read_bytes()))) for path in files) < 3e6
    assert not [path.name for path in files if path.name.startswith("still_")], "figures that nobody will see"


def test_without_javascript_each_picture_is_a_figure_with_its_text(opened):
    page = opened(java_script_enabled=False)
    for kind in KINDS:
        still = part(page, kind).locator(".explore-still img")
        assert still.is_visible() and len(still.get_attribute("alt")) > 40
        assert still.bounding_box()["height"] > 100, "the figure is loaded"
        assert part(page, kind).locator(".explore-still .explore-note").is_visible()
        assert part(page, kind).locator(".explore-caption").is_visible()
        assert len(part(page, kind).locator(".explore-provenance").inner_text()) > 20


def test_with_javascript_the_figure_is_not_there(page):
    assert page.locator(".explore-still").count() == 0


def test_a_picture_that_fails_shows_its_figure(opened, browser, address):
    page = browser.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => { throw new Error('no canvas'); };")
    page.goto(address)
    page.wait_for_selector("[data-explore=reconstruction][data-state=failed]")
    assert part(page, "reconstruction").locator(".explore-still img").is_visible()
    page.close()


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_needs_no_sideways_scroll(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for kind in KINDS:
        box = part(page, kind).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        inside = "(root) => [...root.querySelectorAll('canvas, input, button, fieldset, svg')].filter("
        inside += "(one) => one.getBoundingClientRect().right > root.getBoundingClientRect().right + 1).length"
        assert part(page, kind).evaluate(inside) == 0


def test_every_control_has_a_name(page):
    nameless = """() => [...document.querySelectorAll('.explore input, .explore button, .explore canvas[role=img], .explore svg[role=img]')]
        .filter((one) => !(one.getAttribute('aria-label') || [...(one.labels || [])].map((l) => l.textContent).join('') || one.textContent).trim())
        .map((one) => one.outerHTML)"""  # noqa: E501
    assert page.evaluate(nameless) == []
    assert page.evaluate("[...document.querySelectorAll('.explore fieldset')].every((f) => f.querySelector('legend'))")


def luminance(colour: str) -> float:
    numbers = [float(n) / 255 for n in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    r, g, b = (n / 12.92 if n <= 0.03928 else ((n + 0.055) / 1.055) ** 2.4 for n in numbers)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_dark_mode_changes_text_and_surface_and_no_pixel_of_a_picture(opened):
    pixels = {}
    for theme in ("light", "dark"):
        page = opened(color_scheme=theme)
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        pixels[theme] = [shown(one) for one in part(page, "reconstruction").locator(".explore-picture canvas").all()]
        for kind in KINDS:
            style = "(one) => { const s = getComputedStyle(one); return [s.color, s.backgroundColor, s.filter]; }"
            text, ground, _ = part(page, kind).evaluate(style)
            light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5
            for canvas in part(page, kind).locator("canvas").all()[:3]:
                assert canvas.evaluate(style)[2] == "none"
        assert (luminance(ground) < 0.2) == (theme == "dark")
    assert all(np.array_equal(*pair) for pair in zip(pixels["light"], pixels["dark"], strict=True))


# -- 1: reconstructions ----------------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def test_reconstructions_and_psnr_are_those_of_the_pixels(page):
    root, data = part(page, "reconstruction"), read_data("reconstruction")
    originals = pixels_of(data["originals"], data["size"])
    counts = sorted({arm["tokens"] for arm in data["arms"]})
    for arm, image in zip(data["arms"], [0, 4, 8, 11] * 4, strict=True):
        choose(root, "Image", data["pictures"][image])
        choose(root, "Quantizer", data["names"][arm["quantizer"]])
        slide(root, "Tokens", counts.index(arm["tokens"]))
        original, reconstruction, error = map(shown, root.locator(".explore-picture canvas").all())
        assert np.array_equal(original, originals[image])
        assert np.array_equal(reconstruction, pixels_of(arm["png"], data["size"])[image])
        said = float(root.locator("[data-value=psnr]").inner_text().removesuffix(" dB"))
        assert said == pytest.approx(psnr(original, reconstruction), abs=0.0051)
        difference = np.abs(original.astype(float) - reconstruction).mean(-1)
        assert np.abs(error[..., 0] - np.clip(4 * difference, 0, 255)).max() <= 1
        assert f"{arm['psnr']['mean']:.2f} dB" in root.locator(".explore-result").inner_text()


def test_reconstructions_by_keyboard(page):
    root = part(page, "reconstruction")
    choose(root, "Quantizer", "SoftVQ")
    slide(root, "Tokens", 3)
    before = root.locator(".explore-result").inner_text()
    root.get_by_role("slider", name="Tokens").focus()
    page.keyboard.press("ArrowLeft")
    assert "8 tokens" in root.get_by_role("slider", name="Tokens").get_attribute("aria-valuetext")
    fewer = root.locator(".explore-result").inner_text()
    root.get_by_role("radio", name="SoftVQ", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    other = root.locator(".explore-result").inner_text()
    assert "SoftVQ, 8 tokens" in fewer and "VQ, 8 tokens" in other and len({before, fewer, other}) == 3
    root.get_by_role("radio", name="digit 3", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert root.get_by_role("radio", name="digit 7", exact=True).is_checked()


# -- 2: the posterior ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "squared", "released"])
@pytest.mark.parametrize("tau", [0.02, 0.07, 0.5, 4.0])
def test_the_pages_posterior_entropy_and_kl_term_are_the_librarys(page, form, tau):
    data = read_data("posterior")
    codes = torch.tensor(data["codebook"], dtype=torch.float64)
    tokens = torch.tensor([[0.56, 0.02], *data["tokens"]], dtype=torch.float64)
    quantizer = SoftVQ(len(tokens), 2, len(codes), posterior=form, temperature=tau).double().eval()
    quantizer.codebook.data = codes[None]
    log_q = quantizer.log_posterior(tokens[None])[0].detach()  # (l, k)
    z, _ = quantizer(tokens[None])
    found = page.evaluate(
        """([tokens, codes, tau, form]) => {
            const { posterior, entropy, klTerm, latent } = window.softvqExplore.posterior;
            const q = tokens.map((token) => posterior(token, codes, tau, form));
            return { q, z: q.map((one) => latent(one, codes, form)), h: q.map(entropy), terms: klTerm(q) };
        }""",
        [tokens.tolist(), codes.tolist(), tau, form],
    )
    assert found["q"] == pytest.approx(log_q.exp().numpy(), abs=1e-9)
    assert found["z"] == pytest.approx(z[0].detach().numpy(), abs=1e-9)
    assert found["h"] == pytest.approx(-(log_q.exp() * log_q).sum(-1).numpy(), abs=1e-9)
    assert found["terms"]["kl"] == pytest.approx(kl_term(log_q[None], pooled=False).item(), abs=1e-9)


def test_tau_at_zero_is_vq(page):
    root, data = part(page, "posterior"), read_data("posterior")
    root.get_by_role("slider", name="Temperature τ").focus()
    page.keyboard.press("Home")
    stage = root.locator(".explore-stage")
    q, z = (json.loads(stage.get_attribute(f"data-{name}")) for name in ("q", "z"))
    nearest = int(np.argmin(np.linalg.norm(np.array(data["codebook"]) - [0.56, 0.02], axis=1)))
    assert q == [float(k == nearest) for k in range(len(q))] and z == data["codebook"][nearest]
    assert root.locator("[data-value=entropy]").inner_text() == "0.000"
    assert root.locator("[data-value=perplexity]").inner_text() == "1.000"
    assert root.locator("[data-value=single]").inner_text() == "0.000"
    assert "VQ" in root.locator(".explore-result").inner_text()
    # Hard cells: no more colours than codewords.
    assert len(np.unique(shown(root.locator("canvas")).reshape(-1, 3), axis=0)) == len(data["codebook"])
    page.keyboard.press("End")
    assert float(root.locator("[data-value=perplexity]").inner_text()) > len(data["codebook"]) - 0.5


def test_the_token_is_moved_by_mouse_and_by_keyboard(page):
    root = part(page, "posterior")
    handle = root.get_by_role("slider", name="ẑ, output")
    handle.focus()
    at = [handle.get_attribute("aria-valuetext")]
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowLeft"):
        page.keyboard.press(key)
        at.append(handle.get_attribute("aria-valuetext"))
    root.locator(".explore-plane").scroll_into_view_if_needed()
    box = root.locator(".explore-plane").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4, steps=3)
    page.mouse.up()
    at.append(handle.get_attribute("aria-valuetext"))
    assert len(set(at)) == len(at)
    assert at[-1].startswith("ẑ at −0.55, 0.55;")


# -- 3: tokens -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder():
    """The library's decoder with the page's weights."""
    data = read_data("tokens")
    settings = {"tokens": data["tokens"], "dim": data["dim"], "codebook_size": 4, "image_size": data["size"]}
    tokenizer = Tokenizer.from_preset(data["preset"], quantizer="ae", patch_size=data["patch"], **settings).eval()
    weights = unpack(data["weights"])
    assert set(weights) == {k for k in tokenizer.state_dict() if k.startswith(("decoder.", "from_latent."))}
    tokenizer.load_state_dict(weights, strict=False)
    return tokenizer.decode, unpack(data["latents"])


def test_the_pages_decoder_is_the_librarys(page, decoder):
    decode, latents = decoder
    z = torch.cat([latents["z"], latents["mean"][None], torch.randn(2, *latents["mean"].shape)])
    with torch.no_grad():
        expected = decode(z)
    run = "(z) => { const d = window.softvqExplore.decoder(window.softvqExplore.data.tokens);"
    run += " return z.map((one) => [...d.raw(new Float32Array(one.flat()))]); }"
    found = torch.tensor(page.evaluate(run, z.tolist())).view_as(expected)
    assert (found - expected).abs().max() < 1e-4


def test_tokens_are_taken_away_swapped_and_interpolated(page, decoder):
    decode, latents = decoder
    root, data = part(page, "tokens"), read_data("tokens")
    first, second = data["pair"]
    a, b, mean = latents["z"][first], latents["z"][second], latents["mean"]

    def pixels(z):
        with torch.no_grad():
            return (127.5 * decode(z[None])[0] + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()

    def change() -> float:
        return float(root.locator("[data-value=change]").inner_text())

    mine = root.locator(".explore-four canvas").nth(1)
    press = lambda name: root.get_by_role("button", name=name, exact=True).click()  # noqa: E731
    near = lambda z: np.abs(shown(mine).astype(int) - pixels(z)).max() <= 1  # noqa: E731
    press("All from A")
    assert near(a) and change() == 0
    press("All from B")
    assert near(b) and change() > 0
    press("Half-way")
    assert near((a + b) / 2)
    press("Take all away")
    assert near(mean)
    press("All from A")
    slider = root.get_by_role("slider", name="Token 3", exact=True)
    slider.focus()
    page.keyboard.press("ArrowRight")
    third = a.clone()
    third[2] = a[2] + 0.25 * (b[2] - a[2])
    assert near(third) and "1 moved towards B" in root.locator(".explore-result").inner_text()
    root.get_by_role("checkbox").nth(2).focus()
    page.keyboard.press("Space")
    third[2] = mean[2]
    assert near(third) and slider.is_disabled() and "1 of 8 tokens taken away" in root.inner_text()


def test_each_token_alone_is_shown(page, decoder):
    decode, latents = decoder
    root, data = part(page, "tokens"), read_data("tokens")
    a, mean = latents["z"][data["pair"][0]], latents["mean"]
    choose(root, "Each token alone", "taken away from A")
    small = root.locator(".explore-small canvas")
    assert small.count() == data["tokens"]
    without = a.clone()
    without[4] = mean[4]
    with torch.no_grad():
        expected = (127.5 * decode(without[None])[0] + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.abs(shown(small.nth(4)).astype(int) - expected).max() <= 1
    choose(root, "Each token alone", "taken over from B")
    assert not np.array_equal(shown(small.nth(4)), expected)


# -- 4: costs --------------------------------------------------------------------------------------------------------

STATES = [
    ("SiT", "XL", "256 px", 64, "none", 250, "BL"),
    ("DiT", "B", "512 px", 32, "at every step", 50, "S"),
    ("SiT", "L", "256 px", 128, "up to noise level 0.7", 100, "L"),
    ("MAR", "H", "256 px", 64, "at every step", 64, "B"),
    ("MAR", "B", "256 px", 32, "none", 250, "B"),
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: "-".join(map(str, state[:4])))
def test_costs_are_the_librarys_counts(page, state):
    generator, size, pixels, tokens, guidance, steps, preset = state
    root, data = part(page, "cost"), read_data("cost")
    choose(root, "Generator", generator)
    choose(root, "Guidance", guidance)
    for group, option in (("Size", size), ("Image", pixels), ("Decoder", preset)):
        choose(root, group, option)
    slide(root, "SoftVQ tokens", data["tokens"].index(tokens))
    slide(root, "Steps", data["steps"].index(steps))
    side, kl = int(pixels.split()[0]), {"256 px": 256, "512 px": 1024}[pixels]
    how = {"none": {}, "at every step": {"guidance_scale": 1.5}}.get(
        guidance, {"guidance_scale": 1.5, "guidance_interval": (0.0, 0.7)}
    )
    name, small = generator.lower(), size.lower()
    taken = min(steps, tokens) if name == "mar" else steps
    ours = sampling_macs(generator_config(name, small, tokens, 2048 // tokens), taken, **how)
    theirs = sampling_macs(generator_config(name, small, kl, 16), steps, **how)
    stage = root.locator(".explore-stage")
    total = ours + decoding_macs(preset.lower(), tokens, 2048 // tokens, side)
    against = theirs + kl_decoding_macs(side)
    assert int(stage.get_attribute("data-total")) == total
    assert int(stage.get_attribute("data-baseline")) == against
    said = float(root.locator("[data-value=ratio]").inner_text().split()[0])
    assert said == pytest.approx(against / total, rel=0.05)


def test_the_papers_numbers_and_measured_times_are_named_as_such(page):
    root, data = part(page, "cost"), read_data("cost")
    for group, option in (("Generator", "SiT"), ("Guidance", "none"), ("Size", "XL"), ("Image", "256 px")):
        choose(root, group, option)
    slide(root, "SoftVQ tokens", data["tokens"].index(64))
    paper = root.get_by_role("table", name="The paper's own numbers")
    assert "29.23" in paper.inner_text() and "5.42" in paper.inner_text() and "81.92" in paper.inner_text()
    measured = root.get_by_role("table", name="Measured here: SiT-B")
    row = next(row for row in data["measured"] if row["name"] == "step-64")
    assert f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in measured.inner_text()
    choose(root, "Size", "S")
    assert "The paper prints no row for SiT-S" in root.inner_text()


def test_costs_by_keyboard(page):
    root = part(page, "cost")
    stage = root.locator(".explore-stage")
    before = stage.get_attribute("data-total")
    root.get_by_role("slider", name="Steps", exact=True).focus()
    page.keyboard.press("Home")
    assert "8 steps" in root.inner_text() and stage.get_attribute("data-total") != before
    root.get_by_role("radio", name="SiT", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert root.get_by_role("radio", name="DiT", exact=True).is_checked()


def test_the_static_figures_are_pictures():
    for kind in KINDS:
        with Image.open(Path(__file__).parents[1] / "book/_static/explore" / f"still_{kind}.png") as image:
            assert min(image.size) > 100
