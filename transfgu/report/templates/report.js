// Lay each prediction over its image, enlarge pictures on a click, sort tables by a column. The page is complete without it.
(() => {
  const tools = document.querySelector(".tools");
  tools.hidden = false;
  for (const row of document.querySelectorAll(".pairs .row")) {
    const [image, mask] = row.querySelectorAll(".frame");
    const under = image.querySelector("img").cloneNode();
    under.className = "under";
    under.alt = "";
    mask.prepend(under);
    mask.classList.add("over");
  }
  document.getElementById("opacity").addEventListener("input", event => {
    for (const mask of document.querySelectorAll(".over img:not(.under)")) mask.style.opacity = event.target.value / 100;
  });

  const dialog = document.getElementById("enlarged");
  const large = dialog.querySelector("img");
  dialog.querySelector("button").addEventListener("click", () => dialog.close());
  for (const picture of document.querySelectorAll(".pairs .frame img:not(.under)")) {
    picture.tabIndex = 0;
    picture.setAttribute("role", "button");
    const open = () => {
      large.src = dialog.querySelector("a").href = picture.src;
      large.alt = picture.alt;
      dialog.showModal();
    };
    picture.addEventListener("click", open);
    picture.addEventListener("keydown", event => { if (event.key === "Enter") open(); });
  }

  for (const table of document.querySelectorAll(".sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (head.querySelector(".unseen")) return;
      head.setAttribute("aria-sort", "none");
      head.tabIndex = 0;
      const sort = () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        heads.forEach(other => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = row => row.cells[column].textContent.trim();
        const order = (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
        const rows = [...table.tBodies[0].rows].sort(order);
        table.tBodies[0].append(...(down ? rows.reverse() : rows));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
    });
  }
})();
