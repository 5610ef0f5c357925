// A click, a tap or an arrow key on a picture asks another patch: its cosines to all patches, layer by layer.
"use strict";
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
for (const row of document.querySelectorAll(".maps[data-colours]")) {
  const rows = Number(row.dataset.rows), columns = Number(row.dataset.columns);
  const colours = bytes(row.dataset.colours), asked = row.querySelector(".asked"), frame = row.querySelector(".frame");
  const maps = [...row.querySelectorAll("img[data-cosines]")].map((image) => [image, bytes(image.dataset.cosines)]);
  let patch = Number(row.dataset.patch);
  const ask = (number) => {
    patch = number;
    frame.style.left = `${(100 * (patch % columns)) / columns}%`;
    frame.style.top = `${(100 * Math.floor(patch / columns)) / rows}%`;
    row.querySelector(".shows").textContent = `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
    for (const [image, cosines] of maps) {
      const size = rows * columns, own = cosines.subarray(patch * size, (patch + 1) * size);
      const low = Math.min(...own), high = Math.max(...own), canvas = document.createElement("canvas");
      canvas.width = columns;
      canvas.height = rows;
      const pixels = new ImageData(columns, rows);
      own.forEach((value, place) => {
        const colour = 3 * Math.round((255 * (value - low)) / (high - low || 1));
        pixels.data.set([...colours.subarray(colour, colour + 3), 255], 4 * place);
      });
      canvas.getContext("2d").putImageData(pixels, 0, 0);
      image.src = canvas.toDataURL();
      const shown = [low, high].map((value) => (value / 127.5 - 1).toFixed(2));
      image.parentElement.querySelector("small").textContent = shown.join(" to ");
    }
  };
  asked.addEventListener("click", (event) => {
    const box = asked.getBoundingClientRect();
    const place = (part, count) => Math.min(count - 1, Math.max(0, Math.floor(part * count)));
    const down = place((event.clientY - box.top) / box.height, rows);
    ask(down * columns + place((event.clientX - box.left) / box.width, columns));
  });
  asked.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (step && patch + step >= 0 && patch + step < rows * columns) {
      event.preventDefault();
      ask(patch + step);
    }
  });
}
