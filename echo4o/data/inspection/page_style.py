"""How the page of rows looks: light and dark, wide and narrow."""

STYLE = """
:root { color-scheme: light dark; --ink: #22272e; --faint: #69717b; --line: #d9dee3; --card: #fff; --back: #f5f6f8;
  --reference: #3a78c9; --target: #d1495b; --text: #b7791f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #9aa3ad; --line: #343b43; --card: #1d2228;
  --back: #14181c; --reference: #7fb0ee; --target: #f08a98; --text: #e8b45d; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  max-width: 1280px; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 1.6rem 0 .6rem; }
small, .where, .note, figcaption { color: var(--faint); }
small, .where, figcaption { font-size: .82rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  margin: 0 0 .9rem; }
article.bad { border-color: var(--target); }
header { display: flex; flex-wrap: wrap; gap: .3rem 1rem; justify-content: space-between; margin-bottom: .6rem; }
.where { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.badge { font-weight: 600; }
.parts { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; }
figure { margin: 0; width: 168px; }
figure img { width: 100%; height: 150px; object-fit: contain; border-radius: 6px; background: var(--back);
  border-bottom: 3px solid var(--reference); }
figure.target img { border-color: var(--target); }
figure b { color: var(--reference); }
figure.target b { color: var(--target); }
.text { flex: 1 1 220px; max-width: 460px; border-left: 3px solid var(--text); padding-left: .7rem; }
.text.answer { border-color: var(--target); }
.text p { margin: 0 0 .3rem; overflow-wrap: anywhere; }
details { margin-top: .7rem; }
summary { cursor: pointer; color: var(--faint); }
.layout { width: 100%; max-width: 1100px; margin-top: .5rem; border-radius: 6px; background: #fff; }
"""
