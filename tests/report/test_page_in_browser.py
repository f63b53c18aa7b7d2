"""The pages in a real browser, on a phone's and a desk's width."""

import pytest

from mtl_jax.report import write_comparison, write_report


@pytest.fixture(params=["report", "comparison", "plain"])
def page(request, make_run):
    main = make_run("main")
    if request.param == "plain":
        plain = make_run("single", tasks=("digit",), dense_trunk=True, samples=False)
        return write_report(plain)
    single = make_run("surface_only", tasks=("surface",), dense_trunk=True, seed=1)
    if request.param == "report":
        return write_report(main, [single])
    return write_comparison([main, single], main.parent / "compare.html")


@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_whole_quiet_and_fits(browser, page, width):
    browser.open(page, width)

    assert browser.seen("Runtime.exceptionThrown") == []
    assert browser.seen("Log.entryAdded") == []
    urls = [
        event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")
    ]
    outside = [url for url in urls if not url.startswith("data:")]
    assert outside == [page.resolve().as_uri()]

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


def test_page_prints(browser, make_run):
    browser.open(write_report(make_run("main")), 1280)
    assert browser.pdf().startswith(b"%PDF")


def test_page_has_a_dark_scheme(browser, make_run):
    page = write_report(make_run("main"))
    colors = []
    for dark in (False, True):
        browser.open(page, 390, dark=dark)
        colors.append(
            browser.evaluate("getComputedStyle(document.body).backgroundColor")
        )
    assert colors[0] != colors[1]
