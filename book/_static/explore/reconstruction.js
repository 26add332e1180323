// Explorable 1: an image through tokenizers of another quantizer or number of tokens, with error and PSNR.
(function () {
  "use strict";
  const { element, svg, choice, slider, picture, cut, psnr, difference, register } = window.softvqExplore;
  const GAIN = 4;

  register("reconstruction", async (stage, data) => {
    const { size, pictures, arms, colours, names } = data;
    const originals = await cut(data.originals, size);
    for (const arm of arms) {
      arm.pictures = await cut(arm.png, size);
      arm.measured = arm.pictures.map((pixels, i) => psnr(originals[i], pixels));
    }
    const counts = [...new Set(arms.map((arm) => arm.tokens))].sort((a, b) => a - b);
    const quantizers = Object.keys(names).filter((name) => arms.some((arm) => arm.quantizer === name));
    const state = { image: 0, quantizer: "softvq", tokens: counts[counts.length - 1] };
    if (!quantizers.includes(state.quantizer)) state.quantizer = quantizers[0];
    const find = (quantizer, tokens) => arms.find((arm) => arm.quantizer === quantizer && arm.tokens === tokens);

    const thumbnails = originals.map((pixels, i) => {
      const canvas = element("canvas", { width: size, height: size, class: "explore-pixels", "aria-hidden": "true" });
      canvas.getContext("2d").putImageData(new ImageData(pixels, size, size), 0, 0);
      return { value: String(i), label: pictures[i], picture: canvas };
    });
    const shown = [picture("original", size), picture("", size), picture("", size)];
    const result = element("p", { class: "explore-result", "aria-live": "polite" });
    const plot = chart(counts, quantizers, colours, names);

    const update = () => {
      const arm = find(state.quantizer, state.tokens);
      const [original, pixels] = [originals[state.image], arm.pictures[state.image]];
      const value = arm.measured[state.image];
      const what = `${names[arm.quantizer]}, ${arm.tokens} tokens × ${arm.dim}`;
      shown[0].show(original, `original: ${pictures[state.image]}`);
      shown[1].show(pixels, `reconstruction by ${what}`);
      shown[2].show(difference(original, pixels, GAIN), `error of ${what}, ${GAIN} times enlarged`);
      shown[1].say("reconstruction");
      shown[2].say(`error × ${GAIN}`);
      const all = arm.psnr;
      result.replaceChildren(
        element("strong", { "data-value": "psnr" }, `${value.toFixed(2)} dB`),
        ` PSNR of this image by ${what}. All ${all.n} held-out images: ${all.mean.toFixed(2)} dB ` +
          `[${all.low.toFixed(2)}, ${all.high.toFixed(2)}].`
      );
      plot.update(arms, state);
    };

    stage.append(
      choice("Image", thumbnails, "0", (value) => {
        state.image = Number(value);
        update();
      }),
      element(
        "div",
        { class: "explore-controls" },
        choice(
          "Quantizer",
          quantizers.map((name) => ({ value: name, label: names[name], colour: colours[name] })),
          state.quantizer,
          (value) => {
            state.quantizer = value;
            update();
          }
        ),
        slider(
          "Tokens",
          { min: 0, max: counts.length - 1, step: 1, value: counts.indexOf(state.tokens) },
          (i) => `${counts[i]} tokens × ${find(quantizers[0], counts[i]).dim} channels`,
          (i) => {
            state.tokens = counts[i];
            update();
          }
        )
      ),
      element("div", { class: "explore-pictures" }, shown),
      result,
      plot.node
    );
    update();
  });

  // PSNR of the chosen image against the number of tokens, a line for each quantizer.
  function chart(counts, quantizers, colours, names) {
    const [width, height, left, right, top, bottom] = [420, 190, 44, 64, 12, 34];
    const node = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "explore-chart", role: "img" });
    const x = (tokens) => left + (counts.indexOf(tokens) * (width - left - right)) / (counts.length - 1 || 1);
    const update = (arms, state) => {
      const values = arms.map((arm) => arm.measured[state.image]).filter(Number.isFinite);
      const low = Math.floor(Math.min(...values) - 0.5);
      const high = Math.ceil(Math.max(...values) + 0.5);
      const y = (value) => height - bottom - ((value - low) * (height - top - bottom)) / (high - low);
      node.replaceChildren();
      const step = high - low > 12 ? 4 : high - low > 4 ? 2 : 1;
      for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) {
        node.append(
          svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "explore-grid" }),
          svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick))
        );
      }
      for (const tokens of counts) {
        node.append(svg("text", { x: x(tokens), y: height - 18, "text-anchor": "middle" }, String(tokens)));
      }
      node.append(
        svg("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, "tokens"),
        svg("text", { x: 12, y: height / 2 - 10, "text-anchor": "middle", transform: `rotate(-90 12 ${height / 2 - 10})` }, "PSNR, dB")
      );
      const ends = [];
      const said = [];
      for (const name of quantizers) {
        const line = counts.map((tokens) => arms.find((arm) => arm.quantizer === name && arm.tokens === tokens)).filter(Boolean);
        const points = line.map((arm) => [x(arm.tokens), y(arm.measured[state.image])]);
        node.append(svg("polyline", { points: points.join(" "), stroke: colours[name], class: "explore-line" }));
        line.forEach((arm, i) => {
          const chosen = name === state.quantizer && arm.tokens === state.tokens;
          node.append(svg("circle", { cx: points[i][0], cy: points[i][1], r: chosen ? 7 : 3.5, fill: colours[name], class: chosen ? "explore-chosen" : null }));
        });
        ends.push({ name, y: points[points.length - 1][1] });
        said.push(`${names[name]} ${line.map((arm) => `${arm.measured[state.image].toFixed(1)} at ${arm.tokens}`).join(", ")}`);
      }
      // Names at the ends of the lines, pushed apart where they would lie on each other.
      ends.sort((a, b) => a.y - b.y);
      ends.forEach((end, i) => {
        if (i) end.y = Math.max(end.y, ends[i - 1].y + 14);
      });
      const over = Math.max(0, ends[ends.length - 1].y - (height - bottom));
      for (const end of ends) {
        node.append(svg("text", { x: width - right + 12, y: end.y - over + 4, style: `fill: ${colours[end.name]}`, class: "explore-name" }, names[end.name]));
      }
      node.setAttribute("aria-label", `PSNR of this image in dB by number of tokens: ${said.join("; ")}`);
    };
    return { node, update };
  }
})();
