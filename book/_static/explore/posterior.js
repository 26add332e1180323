// Explorable 2: the posterior over a 2-D codebook as tau goes from VQ (0) to the mean of all codewords (Eq. 4).
(function () {
  "use strict";
  const { element, svg, choice, slider, register, signed } = window.softvqExplore;

  const FLOOR = 1e-6; // inside the logarithm of the average posterior, as in the library
  const FORMS = {
    paper: "distance (Eq. 4)",
    squared: "squared distance",
    released: "cosine (released code)",
  };

  const unit = (p) => {
    const length = Math.hypot(p[0], p[1]);
    return [p[0] / length, p[1] / length];
  };

  // Scores whose softmax at tau is the posterior q(k|z_hat), (k,).
  function scores(zHat, codebook, form) {
    if (form === "released") {
      const z = unit(zHat);
      return codebook.map((c) => {
        const u = unit(c);
        return z[0] * u[0] + z[1] * u[1];
      });
    }
    return codebook.map((c) => {
      const square = (zHat[0] - c[0]) ** 2 + (zHat[1] - c[1]) ** 2;
      return form === "paper" ? -Math.sqrt(square) : -square / 2;
    });
  }

  // q(k|z_hat) at tau; at tau = 0 all of it on the nearest codeword, which is VQ.
  function posterior(zHat, codebook, tau, form) {
    const s = scores(zHat, codebook, form);
    const most = Math.max(...s);
    if (tau === 0) {
      const nearest = s.indexOf(most);
      return s.map((_, k) => (k === nearest ? 1 : 0));
    }
    const weights = s.map((value) => Math.exp((value - most) / tau));
    const sum = weights.reduce((a, b) => a + b, 0);
    return weights.map((weight) => weight / sum);
  }

  const entropy = (q) => -q.reduce((sum, p) => sum + (p > 0 ? p * Math.log(p) : 0), 0);

  // L_kl of Eq. 4 over tokens: mean entropy less the entropy of the mean, in nats.
  function klTerm(posteriors) {
    const n = posteriors.length;
    const single = posteriors.reduce((sum, q) => sum + entropy(q), 0) / n;
    const mean = posteriors[0].map((_, k) => posteriors.reduce((sum, q) => sum + q[k], 0) / n);
    const negative = mean.reduce((sum, m) => sum + m * Math.log(m + FLOOR), 0);
    return { single, mean: -negative, kl: single + negative };
  }

  const latent = (q, codebook, form) => {
    const codes = form === "released" ? codebook.map(unit) : codebook;
    return [0, 1].map((axis) => q.reduce((sum, p, k) => sum + p * codes[k][axis], 0));
  };

  window.softvqExplore.posterior = { posterior, entropy, klTerm, latent };

  register("posterior", (stage, data) => {
    const { codebook, code_colours: colours, tokens } = data;
    const limit = 1.1;
    const side = 400;
    const state = { form: "paper", tau: 0.07, zHat: [0.56, 0.02] };
    const at = (p) => [((p[0] + limit) * side) / (2 * limit), ((limit - p[1]) * side) / (2 * limit)];
    const rgb = colours.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

    // The plane: each point in the codewords' colours mixed by the posterior that a token there would have.
    const grain = 100;
    const field = element("canvas", { width: grain, height: grain, class: "explore-field", "aria-hidden": "true" });
    const overlay = svg("svg", { viewBox: `0 0 ${side} ${side}`, class: "explore-plane" });
    const plane = element("div", { class: "explore-plane-box" }, field, overlay);
    const arrow = svg("line", { class: "explore-arrow" });
    const circle = svg("circle", { cx: side / 2, cy: side / 2, r: side / (2 * limit), class: "explore-sphere" });
    const cloud = svg("g", { class: "explore-cloud" }); // other tokens: a line from z_hat to a dot at z
    const codes = svg("g", { class: "explore-codes" });
    const mean = svg("rect", { width: 14, height: 14, class: "explore-latent" });
    const meanName = svg("text", { class: "explore-mark" }, "z");
    const handle = svg("circle", { r: 11, class: "explore-handle", tabindex: 0, role: "slider", "aria-label": "ẑ, output of the encoder: arrow keys move it" });
    const handleName = svg("text", { class: "explore-mark" }, "ẑ");
    overlay.append(circle, codes, cloud, arrow, handle, mean, meanName, handleName);

    const bars = element("div", { class: "explore-bars", role: "img" });
    const filled = codebook.map((_, k) => {
      const bar = element("div", { class: "explore-bar", style: `background: ${colours[k]}` });
      bars.append(element("div", { class: "explore-bar-box" }, bar, element("span", {}, `c${k + 1}`)));
      return bar;
    });
    const value = (name, label) => {
      const node = element("dd", { "data-value": name });
      return { node, row: [element("dt", {}, label), node] };
    };
    const values = {
      entropy: value("entropy", "H(q) of this token, nats"),
      perplexity: value("perplexity", "perplexity exp H(q)"),
      single: value("single", `E H(q) of all ${tokens.length + 1} tokens`),
      mean: value("mean", "H(E q), of their mean"),
      kl: value("kl", "KL term, E H(q) − H(E q)"),
    };
    const readout = element("dl", { class: "explore-values" }, Object.values(values).map((one) => one.row));
    const result = element("p", { class: "explore-result", "aria-live": "polite" });

    const drawField = () => {
      const context = field.getContext("2d");
      const image = context.createImageData(grain, grain);
      for (let j = 0; j < grain; j += 1) {
        for (let i = 0; i < grain; i += 1) {
          const point = [((2 * (i + 0.5)) / grain - 1) * limit, (1 - (2 * (j + 0.5)) / grain) * limit];
          const q = posterior(point, codebook, state.tau, state.form);
          const p = 4 * (j * grain + i);
          for (let c = 0; c < 3; c += 1) {
            const mixed = q.reduce((sum, weight, k) => sum + weight * rgb[k][c], 0);
            image.data[p + c] = 255 - 0.62 * (255 - mixed); // paler, so that marks can be seen
          }
          image.data[p + 3] = 255;
        }
      }
      context.putImageData(image, 0, 0);
    };

    const place = (node, point) => {
      const [x, y] = at(point);
      node.setAttribute("cx", x);
      node.setAttribute("cy", y);
      return [x, y];
    };

    const update = (fieldToo) => {
      const { form, tau, zHat } = state;
      if (fieldToo) drawField();
      const onSphere = (p) => (form === "released" ? unit(p) : p);
      circle.style.display = form === "released" ? "" : "none";
      const q = posterior(zHat, codebook, tau, form);
      const z = latent(q, codebook, form);
      codes.replaceChildren(
        ...codebook.map((c, k) => {
          const [x, y] = at(onSphere(c));
          return svg("circle", { cx: x, cy: y, r: 5 + 13 * Math.sqrt(q[k]), fill: colours[k] }, svg("title", {}, `codeword ${k + 1}: q = ${q[k].toFixed(3)}`));
        })
      );
      const all = [...tokens, zHat].map((token) => posterior(token, codebook, tau, form));
      cloud.replaceChildren(
        ...tokens.flatMap((_, i) => {
          const [x, y] = at(latent(all[i], codebook, form));
          const [fromX, fromY] = at(tokens[i]);
          return [svg("line", { x1: fromX, y1: fromY, x2: x, y2: y }), svg("circle", { cx: x, cy: y, r: 2.5 })];
        })
      );
      const [x, y] = place(handle, zHat);
      const [u, v] = at(z);
      mean.setAttribute("x", u - 7);
      mean.setAttribute("y", v - 7);
      mean.setAttribute("transform", `rotate(45 ${u} ${v})`);
      const set = (node, attributes) => Object.entries(attributes).forEach(([name, one]) => node.setAttribute(name, one));
      set(arrow, { x1: x, y1: y, x2: u, y2: v });
      // Names stand on the line through both, outside of it, so that neither hides the other.
      const apart = Math.hypot(x - u, y - v);
      const [dx, dy] = apart > 1 ? [(x - u) / apart, (y - v) / apart] : [0, -1];
      const inside = (number) => Math.max(12, Math.min(side - 12, number));
      set(handleName, { x: inside(x + 24 * dx), y: inside(y + 24 * dy) });
      set(meanName, { x: inside(u - 20 * dx), y: inside(v - 20 * dy) });
      set(handle, {
        "aria-valuemin": -limit,
        "aria-valuemax": limit,
        "aria-valuenow": zHat[0].toFixed(2),
        "aria-valuetext": `ẑ at ${signed(zHat[0], 2)}, ${signed(zHat[1], 2)}; z at ${signed(z[0], 2)}, ${signed(z[1], 2)}`,
      });
      const h = entropy(q);
      const { single, mean: ofMean, kl } = klTerm(all);
      const numbers = { entropy: h, perplexity: Math.exp(h), single, mean: ofMean, kl };
      for (const [name, number] of Object.entries(numbers)) values[name].node.textContent = signed(number + 0, 3);
      filled.forEach((bar, k) => {
        bar.style.height = `${100 * q[k]}%`;
      });
      bars.setAttribute("aria-label", `posterior: ${q.map((p, k) => `codeword ${k + 1} ${(100 * p).toFixed(0)} %`).join(", ")}`);
      result.textContent =
        tau === 0
          ? "τ = 0: the nearest codeword alone, z jumps from one to the next. This is VQ."
          : Math.exp(h) > codebook.length - 0.2
            ? `τ = ${tau.toPrecision(2)}: all codewords count alike, z hardly moves any more.`
            : `τ = ${tau.toPrecision(2)}: z is a mean of ${Math.exp(h).toFixed(1)} codewords in effect, and moves smoothly with ẑ.`;
      stage.dataset.q = JSON.stringify(q);
      stage.dataset.z = JSON.stringify(z);
      stage.dataset.numbers = JSON.stringify(numbers);
    };

    const clamp = (number) => Math.max(-limit + 0.03, Math.min(limit - 0.03, number));
    const move = (x, y) => {
      state.zHat = [clamp(x), clamp(y)];
      if (Math.hypot(...state.zHat) < 1e-3) state.zHat = [1e-3, 0]; // the origin has no direction
      update(false);
    };
    const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    handle.addEventListener("keydown", (event) => {
      const step = keys[event.key];
      if (!step) return;
      event.preventDefault();
      const by = event.shiftKey ? 0.2 : 0.04;
      move(state.zHat[0] + by * step[0], state.zHat[1] + by * step[1]);
    });
    let dragging = false;
    const follow = (event) => {
      const box = overlay.getBoundingClientRect();
      move((2 * (event.clientX - box.left)) / box.width * limit - limit, limit - (2 * (event.clientY - box.top)) / box.height * limit);
    };
    overlay.addEventListener("pointerdown", (event) => {
      dragging = true;
      overlay.setPointerCapture(event.pointerId);
      follow(event);
      handle.focus({ preventScroll: true });
      event.preventDefault();
    });
    overlay.addEventListener("pointermove", (event) => dragging && follow(event));
    for (const end of ["pointerup", "pointercancel"]) overlay.addEventListener(end, () => (dragging = false));

    // Position 0 of the slider is tau = 0, the others are spread evenly over the logarithm from 0.005 to 5.
    const last = 60;
    const tauAt = (i) => (i === 0 ? 0 : 0.005 * 1000 ** ((i - 1) / (last - 1)));
    const near = 1 + Math.round((Math.log(state.tau / 0.005) / Math.log(1000)) * (last - 1));
    state.tau = tauAt(near);
    stage.append(
      element(
        "div",
        { class: "explore-columns" },
        plane,
        element(
          "div",
          { class: "explore-side" },
          slider("Temperature τ", { min: 0, max: last, step: 1, value: near }, (i) => (i ? tauAt(i).toPrecision(2) : "0 (VQ)"), (i) => {
            state.tau = tauAt(i);
            update(true);
          }),
          choice("Form of the posterior", Object.entries(FORMS).map(([name, label]) => ({ value: name, label })), state.form, (form) => {
            state.form = form;
            update(true);
          }),
          element("p", { class: "explore-label" }, "q(k | ẑ) of the token that you drag"),
          bars,
          readout
        )
      ),
      result
    );
    update(true);
  });
})();
