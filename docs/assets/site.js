"use strict";
{
  // A click on a heading of a table of results sorts by its column: up, then down.
  const value = (cell) => {
    const text = cell.textContent.trim();
    const number = Number.parseFloat(text.replace("−", "-").replace(/^[✓✗?] /, ""));
    return Number.isNaN(number) ? text : number;
  };
  const empty = (v) => v === "" || v === "—" || v === "–";
  for (const table of document.querySelectorAll(".wide table")) {
    const heads = [...table.querySelectorAll("thead th")];
    if (!heads.some((head) => head.textContent.trim()) || table.tBodies[0].rows.length < 3) continue;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.classList.add("sorts");
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].map((row) => [value(row.cells[column]), row]);
        rows.sort(([a], [b]) => {
          if (empty(a) || empty(b)) return empty(a) - empty(b);
          if (typeof a === "number" && typeof b === "number") return sign * (a - b);
          return sign * String(a).localeCompare(String(b), "en", { numeric: true });
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }
}
