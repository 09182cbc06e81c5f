/* The page of a gradient audit: one heat map at a time, a filter over the parameters. */
(() => {
  const { announce } = glasstune;

  const choice = document.getElementById("map-choice");
  if (choice) {
    const maps = [...document.querySelectorAll(".one-map")];
    const show = (key) => maps.forEach((map) => (map.hidden = map.dataset.map !== key));
    choice.hidden = false;
    choice.addEventListener("change", (event) => show(event.target.value));
    show(choice.querySelector("input:checked").value);
  }

  const filter = document.getElementById("row-filter");
  const trained = document.getElementById("only-trained");
  const layers = [...document.querySelectorAll("details.layer")];
  const none = document.getElementById("rows-none");
  const opened = new Set(layers.filter((layer) => layer.open));

  function search() {
    const query = filter.value.trim().toLowerCase();
    let count = 0;
    for (const layer of layers) {
      let inside = 0;
      for (const row of layer.querySelectorAll("tbody tr")) {
        const text = `${row.dataset.name} ${row.dataset.status.replaceAll("_", " ")}`.toLowerCase();
        row.hidden = !text.includes(query) || (trained.checked && !("trained" in row.dataset));
        inside += !row.hidden;
      }
      layer.hidden = inside === 0;
      layer.open = query ? inside > 0 : opened.has(layer);
      count += inside;
    }
    none.hidden = count > 0;
    announce(`${count} parameters match`);
  }

  filter.addEventListener("input", search);
  trained.addEventListener("change", search);
  document.getElementById("rows-unfold").addEventListener("click", () => layers.forEach((layer) => (layer.open = true)));
  document.getElementById("rows-fold").addEventListener("click", () => layers.forEach((layer) => (layer.open = false)));
})();
