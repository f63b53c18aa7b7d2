"""The pages in a real browser, on a phone's and a desk's width."""

import pytest

from mtl_jax.report import write_comparison, write_report


def report(make_run):
    single = make_run("surface_only", tasks=("surface",), dense_trunk=True, seed=1)
    return write_report(make_run("main"), [single])


def plain_report(make_run):
    run = make_run("single", tasks=("digit",), dense_trunk=True, samples=False)
    return write_report(run)


def comparison(make_run):
    tasks = ("surface", "digit")
    runs = [make_run(f"a_long_run_name_{n}", tasks=tasks, seed=n) for n in range(6)]
    return write_comparison(runs, runs[0].parent / "compare.html")


@pytest.mark.parametrize("make_page", [report, plain_report, comparison])
def test_page_is_whole_quiet_and_fits(browser, make_run, make_page):
    page = make_page(make_run)
    for width in (390, 1280):
        check_page(browser, page, width)


def check_page(browser, page, width):
    browser.open(page, width)

    assert browser.seen("Runtime.exceptionThrown") == []
    assert browser.seen("Log.entryAdded") == []
    requests = browser.seen("Network.requestWillBeSent")
    urls = [event["request"]["url"] for event in requests]
    asked_for = [url for url in urls if not url.startswith("data:")]
    assert asked_for == [page.resolve().as_uri()]

    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert widths
    assert min(widths) > 0
    alternatives = browser.evaluate("[...document.images].map(image => image.alt)")
    assert all(alternatives)

    assert browser.evaluate("window.innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing sticks out but what lies in a container that scrolls by itself.
    sticking_out = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(element => "
        "element.getBoundingClientRect().right > window.innerWidth + 1 && "
        "!element.closest('.scroll')).map(element => element.outerHTML.slice(0, 80))"
    )
    assert sticking_out == []


def test_page_prints_and_has_a_dark_scheme(browser, make_run):
    page = write_report(make_run("main", tasks=("surface", "digit"), num_steps=10))
    colors = []
    for dark in (False, True):
        browser.open(page, 390, dark=dark)
        colors.append(
            browser.evaluate("getComputedStyle(document.body).backgroundColor")
        )
    assert colors[0] != colors[1]
    assert browser.pdf().startswith(b"%PDF")


def test_the_checks_can_fail(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width">'
        '<img src="missing.png" alt="x"><div style="width: 900px">wide</div>'
    )
    with pytest.raises(AssertionError):
        check_page(browser, page, 390)
    urls = [e["request"]["url"] for e in browser.seen("Network.requestWillBeSent")]
    assert any(url.endswith("missing.png") for url in urls)
    assert browser.evaluate("document.images[0].naturalWidth") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
