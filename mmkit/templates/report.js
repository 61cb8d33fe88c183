// Tables sort by a click on a column's head; cells carry their number in data-v where the text is not one.
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      const both = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return (both ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }));
}

// Examples are filtered by the kind of their question, and by whether the encoders agree.
const filters = {kind: document.querySelector("#kind-filter"), agree: document.querySelector("#agree-filter")};
const examples = [...document.querySelectorAll("#examples figure")];
const filterExamples = () => {
  for (const figure of examples) {
    figure.hidden = Object.entries(filters).some(([name, choice]) => choice?.value && choice.value !== figure.dataset[name]);
  }
  const shown = examples.filter((figure) => !figure.hidden).length;
  document.querySelector("#filter-count").textContent = `${shown} of ${examples.length} shown`;
};
for (const choice of Object.values(filters)) choice?.addEventListener("change", filterExamples);
if (examples.length) filterExamples();
