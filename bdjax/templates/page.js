"use strict";
// A click on a heading sorts by its column: up, then down. Cells without a value stay at the end.
for (const table of document.querySelectorAll("table")) {
  const heads = table.querySelectorAll("th[data-column]");
  for (const head of heads) {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const number = head.classList.contains("number");
      const value = (row) => row.cells[head.dataset.column].dataset.value;
      const compare = (a, b) => number ? (a - b) || 0 : a.localeCompare(b, "en", { numeric: true });
      const sorted = [...table.tBodies[0].rows].sort((a, b) => {
        const [u, v] = [value(a), value(b)];
        return u === "" || v === "" ? (u === "") - (v === "") : sign * compare(u, v);
      });
      table.tBodies[0].append(...sorted);
    });
  }
}
// A picture that does not fit is shown whole, and, asked for, as large as it was drawn.
for (const button of document.querySelectorAll(".zoom")) {
  const card = button.parentElement, image = card.querySelector("img");
  const fit = () => {
    const whole = image.clientWidth >= Number(image.getAttribute("width")) - 1;
    button.hidden = whole && !card.classList.contains("full");
  };
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", card.classList.toggle("full"));
    fit();
  });
  addEventListener("resize", fit);
  fit();
}
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
