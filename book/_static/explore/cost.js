// Explorable 4: multiply-accumulates of an image by generator, tokens, steps and guidance, from the library's counts.
(function () {
  "use strict";
  const { element, choice, slider, register } = window.softvqExplore;

  const GUIDANCE = { none: "none", all: "at every step", low: "up to noise level 0.7" };
  const CHANNELS = { kl256: 256, kl512: 1024 };
  const tera = (macs) => (macs >= 1e12 ? `${(macs / 1e12).toPrecision(3)} T` : `${(macs / 1e9).toPrecision(3)} G`);
  const times = (ratio) => (ratio >= 10 ? ratio.toFixed(0) : ratio.toPrecision(2));

  register("cost", (stage, data) => {
    const { sizes, names, tokens, dims, steps, decoders, sampling, forward, decoding } = data;
    const state = { generator: "sit", size: "xl", tokens: 64, pixels: 256, steps: 250, guidance: "none", decoder: "bl" };
    const radio = (label, options, name) =>
      choice(label, options, String(state[name]), (value) => {
        state[name] = typeof state[name] === "number" ? Number(value) : value;
        update();
      });
    const plain = (values, label) => values.map((value) => ({ value: String(value), label: label(value) }));

    let size = null;
    const sizeBox = element("div", {});
    const newSizes = () => {
      if (!sizes[state.generator].includes(state.size)) state.size = sizes[state.generator].at(-1);
      size = radio("Size", plain(sizes[state.generator], (one) => one.toUpperCase()), "size");
      sizeBox.replaceChildren(size);
    };
    const guidance = radio("Guidance", Object.entries(GUIDANCE).map(([value, label]) => ({ value, label })), "guidance");
    const stepLine = slider("Steps", { min: 0, max: steps.length - 1, step: 1, value: steps.indexOf(state.steps) }, (i) => `${steps[i]} steps`, (i) => {
      state.steps = steps[i];
      update();
    });
    const tokenLine = slider("SoftVQ tokens", { min: 0, max: tokens.length - 1, step: 1, value: tokens.indexOf(state.tokens) }, (i) => `${tokens[i]} × ${dims[tokens[i]]} channels`, (i) => {
      state.tokens = tokens[i];
      update();
    });
    const result = element("p", { class: "explore-result", "aria-live": "polite" });
    const body = element("div", {});
    const paper = element("div", {});
    const measured = element("div", {});

    const count = (latents, stepsTaken) => {
      const { generator, size: of, guidance: how, pixels } = state;
      const soft = latents === "softvq";
      const key = soft ? String(state.tokens) : `kl${pixels}`;
      const sampled = sampling[generator][of][key][how][stepsTaken];
      const decoded = soft ? decoding[pixels][state.decoder][state.tokens] : decoding[pixels].kl;
      return { pass: forward[generator][of][key], sampled, decoded, total: sampled + decoded, tokens: soft ? state.tokens : CHANNELS[key] };
    };

    const update = () => {
      const mar = state.generator === "mar";
      guidance.allow((value) => !(mar && value === "low"));
      if (mar && state.guidance === "low") {
        state.guidance = "all";
        guidance.choose("all");
      }
      // MAR draws at least one token in each step.
      const taken = mar ? Math.max(...steps.filter((one) => one <= Math.min(state.steps, state.tokens))) : state.steps;
      const klTaken = mar ? Math.max(...steps.filter((one) => one <= state.steps)) : state.steps;
      const ours = count("softvq", taken);
      const theirs = count("kl", klTaken);
      const ratio = theirs.total / ours.total;
      const name = `${names[state.generator]}-${state.size.toUpperCase()}`;
      const most = Math.max(ours.total, theirs.total);
      const row = (label, colour, one, stepsOf) =>
        element(
          "div",
          { class: "explore-cost" },
          element("div", { class: "explore-cost-name" }, label),
          element(
            "div",
            { class: "explore-cost-track" },
            element("div", { class: "explore-cost-bar", style: `width: ${(100 * one.sampled) / most}%; background: ${colour}` }),
            element("div", { class: "explore-cost-bar explore-cost-decode", style: `width: ${(100 * one.decoded) / most}%; background: ${colour}` })
          ),
          element("div", { class: "explore-cost-sum" }, `${tera(one.total)}MACs: ${stepsOf} steps ${tera(one.sampled)}, decoding ${tera(one.decoded)}`)
        );
      body.replaceChildren(
        row(`${state.tokens} tokens, ${decoders[state.decoder]}`, data.colours.softvq, ours, taken),
        row(`${theirs.tokens} ${mar ? "tokens" : "patches"} of KL latents, SD-VAE`, data.colours.kl, theirs, klTaken)
      );
      result.replaceChildren(
        element("strong", { "data-value": "ratio" }, `${times(ratio)} times`),
        ` fewer multiply-accumulates for an image of ${state.pixels} pixels by ${name} than on KL latents: its relative ` +
          "throughput where arithmetic alone counts. One forward pass: ",
        element("span", { "data-value": "pass" }, `${(ours.pass / 1e9).toFixed(2)} G`),
        ` against ${(theirs.pass / 1e9).toFixed(2)} G.`,
        taken !== state.steps ? ` MAR draws at least one token a step, so ${state.tokens} tokens take ${taken} of these steps.` : ""
      );
      stage.dataset.total = String(ours.total);
      stage.dataset.baseline = String(theirs.total);
      stage.dataset.steps = String(taken);
      showPaper(name);
      showMeasured();
    };

    const table = (caption, head, rows) =>
      element(
        "div",
        { class: "explore-table", tabindex: 0, role: "region", "aria-label": caption },
        element(
          "table",
          {},
          element("caption", {}, caption),
          element("thead", {}, element("tr", {}, head.map((cell) => element("th", { scope: "col" }, cell)))),
          element("tbody", {}, rows.map((cells) => element("tr", {}, cells.map((cell) => element("td", {}, cell)))))
        )
      );

    const showPaper = (name) => {
      const place = state.pixels === 256 ? "Tab. 1" : "Tab. 2";
      const rows = data.paper.filter(
        (row) =>
          row.place === place && row.generator === state.generator && row.size === state.size &&
          (row.latents === "kl" || row.tokens === state.tokens)
      );
      if (!rows.length) {
        paper.replaceChildren(element("p", { class: "explore-note" }, `The paper prints no row for ${name} with ${state.tokens} tokens at ${state.pixels} pixels.`));
        return;
      }
      paper.replaceChildren(
        table(
          `The paper's own numbers (${place}), on its GPU and with its way of counting`,
          ["row", "Gflops, as printed", "images a second"],
          [...new Set(rows.map((row) => row.what))].map((what) => {
            const cell = (metric) => rows.find((row) => row.what === what && row.metric === metric);
            return [what, cell("gflops") ? String(cell("gflops").value) : "–", cell("throughput") ? String(cell("throughput").value) : "–"];
          })
        )
      );
    };

    const showMeasured = () => {
      const relevant = data.measured.filter((row) => {
        if (row.name.startsWith("step-")) return row.name === `step-${state.tokens}` || (state.pixels === 512 && row.name === "step-1024");
        if (row.name.startsWith("image-")) return row.name.startsWith(`image-${state.tokens}-${state.pixels}-`);
        return state.guidance === "low";
      });
      if (!relevant.length) {
        measured.replaceChildren(element("p", { class: "explore-note" }, `Time was not measured with ${state.tokens} tokens at ${state.pixels} pixels.`));
        return;
      }
      const first = relevant[0];
      measured.replaceChildren(
        table(
          `Measured here: SiT-${first.size.toUpperCase()}, ${first.batch_size} image at a time, ${first.device}, ${first.date.slice(0, 10)}`,
          ["what", "time against", "ratio [95 %]", "by MACs"],
          relevant.map((row) => [
            row.what + (row.derived ? " (computed from measured parts)" : ""),
            row.against,
            `${row.value.toFixed(3)} [${row.low.toFixed(3)}, ${row.high.toFixed(3)}]`,
            row.expected === null ? "–" : row.expected.toFixed(3),
          ])
        )
      );
    };

    newSizes();
    stage.append(
      element(
        "div",
        { class: "explore-controls" },
        choice("Generator", plain(Object.keys(sizes), (one) => names[one]), state.generator, (value) => {
          state.generator = value;
          newSizes();
          update();
        }),
        sizeBox,
        radio("Image", plain([256, 512], (one) => `${one} px`), "pixels"),
        radio("Decoder", Object.entries(decoders).map(([value, label]) => ({ value, label: label.replace("SoftVQ-", "") })), "decoder"),
        guidance,
        tokenLine,
        stepLine
      ),
      body,
      result,
      paper,
      measured
    );
    update();
  });
})();
