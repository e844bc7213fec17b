"""The Python that a page shows, as one program."""


def program(path):
    """Its code blocks in order, each line where the page has it, so that a traceback shows the page's line."""
    lines, inside = [], False
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
        lines.append(line if inside and not line.startswith("```") else "")
    return "\n".join(lines)


def run(path):
    """Runs the page here, in a namespace of its own, and returns it."""
    names = {"__name__": path.stem}
    exec(compile(program(path), str(path), "exec"), names)
    return names
