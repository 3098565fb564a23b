"""Reads a report as a browser would: its tags, its text, its scripts."""

import base64
import hashlib
import json
from html.parser import HTMLParser

_LOADS = {"src", "href", "srcset", "action", "formaction", "poster", "data", "background", "ping", "xlink:href"}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: (name, attributes) of every tag.
        text: of the page, without scripts and styles.
        scripts: the text of each script that runs.
        charts: what the charts are drawn from, by their key.
    """

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.charts = [], [], {}
        self.text = ""
        self._inside = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag in ("script", "style"):
            self._inside = "data" if attributes.get("type") == "application/json" else tag

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data):
        if self._inside == "data":
            self.charts = {chart["key"]: chart for chart in json.loads(data)}
        elif self._inside == "script":
            self.scripts.append(data)
        elif self._inside is None:
            self.text += data

    def all(self, tag):
        """Attributes of every tag of that name."""
        return [attributes for name, attributes in self.tags if name == tag]

    def loads(self):
        """Everything that a browser would fetch or could be sent to."""
        return [
            value
            for _, attributes in self.tags
            for name, value in attributes.items()
            if name in _LOADS and value and not value.startswith("data:")
        ]

    def policy(self):
        """The Content-Security-Policy as names and values."""
        (content,) = [
            each["content"] for each in self.all("meta") if each.get("http-equiv") == "Content-Security-Policy"
        ]
        return dict(rule.strip().split(" ", 1) for rule in content.split(";"))

    def trace(self, chart, name):
        """One trace of a chart."""
        (found,) = [trace for trace in self.charts[chart]["traces"] if trace["name"] == name]
        return found


def hash_of(script):
    """As a policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
