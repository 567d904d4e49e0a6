"""What makes the galleries filter, search and sort. The page is whole without it."""

SCRIPT = """
document.documentElement.classList.add("js");
for (const gallery of document.querySelectorAll(".gallery")) {
  const form = gallery.querySelector("form"), list = gallery.querySelector(".items");
  const more = gallery.querySelector(".more"), count = gallery.querySelector("output");
  const cards = [...list.children].map((card, place) => ({card, place, text: "", tag: card.dataset.tag,
    kinds: card.dataset.kinds.split(" "), score: parseFloat(card.dataset.score),
    change: parseFloat(card.dataset.change)}));
  const size = 24;
  let limit = size, order = "";
  const rank = (value, sign) => Number.isNaN(value) ? Infinity : sign * value;
  const orders = {
    row: (a, b) => a.card.dataset.row - b.card.dataset.row,
    low: (a, b) => rank(a.score, 1) - rank(b.score, 1) || a.place - b.place,
    high: (a, b) => rank(a.score, -1) - rank(b.score, -1) || a.place - b.place,
    change: (a, b) => rank(Math.abs(a.change), -1) - rank(Math.abs(b.change), -1) || a.place - b.place,
    worse: (a, b) => rank(a.change, 1) - rank(b.change, 1) || a.place - b.place,
    better: (a, b) => rank(a.change, -1) - rank(b.change, -1) || a.place - b.place,
  };
  const show = () => {
    const data = new FormData(form), words = data.get("search").toLocaleLowerCase().split(/\\s+/).filter(Boolean);
    if (data.get("sort") !== order) {
      order = data.get("sort");
      cards.sort(orders[order]);
      list.append(...cards.map(entry => entry.card));
    }
    let found = 0;
    for (const entry of cards) {
      if (words.length && !entry.text) entry.text = entry.card.textContent.toLocaleLowerCase();
      const fits = (!data.get("tag") || entry.tag === data.get("tag"))
        && (!data.get("show") || entry.kinds.includes(data.get("show")))
        && words.every(word => entry.text.includes(word));
      found += fits;
      entry.card.hidden = !fits || found > limit;
    }
    const all = found < cards.length ? `, ${cards.length} in all` : "";
    count.textContent = `${Math.min(found, limit)} of ${found} shown${all}`;
    more.hidden = found <= limit;
  };
  for (const kind of ["input", "change"]) form.addEventListener(kind, () => { limit = size; show(); });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { limit = size; show(); }));
  more.firstElementChild.addEventListener("click", () => {
    const first = cards.filter(entry => !entry.card.hidden).length;
    limit += 4 * size;
    show();
    const next = cards.filter(entry => !entry.card.hidden)[first];
    if (next) next.card.querySelector("a").focus({preventScroll: true});
  });
  gallery.filter = (tag, kind) => {
    form.reset();
    form.elements.tag.value = tag || "";
    form.elements.show.value = kind || "";
    limit = size;
    setTimeout(() => { show(); gallery.scrollIntoView(); });
  };
  const reveal = () => {
    const entry = cards.find(entry => "#" + entry.card.id === decodeURIComponent(location.hash));
    if (!entry || !entry.card.hidden) return;
    form.reset();
    limit = cards.length;
    setTimeout(() => { show(); entry.card.scrollIntoView(); });
  };
  addEventListener("hashchange", reveal);
  show();
  reveal();
}
document.addEventListener("click", event => {
  const link = event.target.closest("a[data-filter]");
  const gallery = link && document.getElementById(link.dataset.filter);
  if (!gallery || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  gallery.filter(link.dataset.tag, link.dataset.kind);
});
"""
