// Explorable 3: take single latent tokens away, swap or interpolate them between two images, and decode again.
(function () {
  "use strict";
  const { element, choice, slider, picture, cut, difference, register, unpack, decoder } = window.softvqExplore;
  const GAIN = 3;

  register("tokens", async (stage, data) => {
    const { size, tokens, dim, pictures } = data;
    const originals = await cut(data.originals, size);
    const { z, mean } = unpack(data.latents);
    const decode = decoder(data);
    const state = { a: data.pair[0], b: data.pair[1], mix: new Array(tokens).fill(0), away: new Array(tokens).fill(false), lens: "away" };
    const latents = (image) => z.subarray(image * tokens * dim, (image + 1) * tokens * dim);

    // Latents of A, in which token t is moved towards B's by mix[t], or is the mean of many images where it is away.
    const mixed = (mix, away) => {
      const [from, to] = [latents(state.a), latents(state.b)];
      const out = new Float32Array(tokens * dim);
      for (let t = 0; t < tokens; t += 1) {
        for (let k = t * dim; k < (t + 1) * dim; k += 1) out[k] = away[t] ? mean[k] : from[k] + mix[t] * (to[k] - from[k]);
      }
      return out;
    };
    const only = (t, value, rest) => Array.from({ length: tokens }, (_, i) => (i === t ? value : rest));
    const levels = (a, b) => {
      let sum = 0;
      for (let i = 0; i < a.length; i += 1) if (i % 4 < 3) sum += Math.abs(a[i] - b[i]);
      return sum / ((a.length * 3) / 4);
    };

    const thumbnails = () =>
      originals.map((pixels, i) => {
        const canvas = element("canvas", { width: size, height: size, class: "explore-pixels", "aria-hidden": "true" });
        canvas.getContext("2d").putImageData(new ImageData(pixels, size, size), 0, 0);
        return { value: String(i), label: pictures[i], picture: canvas };
      });
    const pick = (label, name) =>
      choice(label, thumbnails(), String(state[name]), (value) => {
        state[name] = Number(value);
        updateAll();
      });

    const shown = ["A, decoded", "your tokens, decoded", `change from A × ${GAIN}`, "B, decoded"].map((caption) => picture(caption, size));
    const result = element("p", { class: "explore-result", "aria-live": "polite" });
    const rows = Array.from({ length: tokens }, (_, t) => {
      const line = slider(`Token ${t + 1}`, { min: 0, max: 1, step: 0.25, value: 0 }, (value) => (value === 0 ? "A" : value === 1 ? "B" : `${value}`), (value) => {
        state.mix[t] = value;
        update();
      });
      const box = element("input", { type: "checkbox" });
      box.addEventListener("change", () => {
        state.away[t] = box.checked;
        line.input.disabled = box.checked;
        update();
      });
      line.append(element("label", { class: "explore-away" }, box, " take away"));
      line.box = box;
      return line;
    });
    const setAll = (mix, away) => {
      state.mix = mix;
      state.away = away;
      rows.forEach((row, t) => {
        row.set(mix[t]);
        row.box.checked = away[t];
        row.input.disabled = away[t];
      });
      update();
    };
    const button = (text, act) => element("button", { type: "button", class: "explore-button", onclick: act }, text);
    const none = new Array(tokens).fill(false);

    // What each token does alone: a row of small pictures.
    const small = Array.from({ length: tokens }, (_, t) => picture(`${t + 1}`, size));
    const lens = choice("Each token alone", [{ value: "away", label: "taken away from A" }, { value: "swap", label: "taken over from B" }, { value: "keep", label: "kept of A, others from B" }], state.lens, (value) => {
      state.lens = value;
      updateLens();
    });

    const update = () => {
      const original = decode(latents(state.a));
      const pixels = decode(mixed(state.mix, state.away));
      shown[0].show(original, `A, decoded from its own tokens: ${pictures[state.a]}`);
      shown[1].show(pixels, "decoded from the tokens as they are set");
      shown[2].show(difference(original, pixels, GAIN), `change from A, ${GAIN} times enlarged`);
      shown[3].show(decode(latents(state.b)), `B, decoded from its own tokens: ${pictures[state.b]}`);
      const away = state.away.filter(Boolean).length;
      const moved = state.mix.filter((value, t) => value > 0 && !state.away[t]).length;
      result.replaceChildren(
        element("strong", { "data-value": "change" }, levels(original, pixels).toFixed(1)),
        ` levels of 255 mean change from A; ${away} of ${tokens} tokens taken away, ${moved} moved towards B.`
      );
    };
    const updateLens = () => {
      const original = decode(latents(state.a));
      const kinds = {
        away: (t) => mixed(only(t, 0, 0), only(t, true, false)),
        swap: (t) => mixed(only(t, 1, 0), none),
        keep: (t) => mixed(only(t, 0, 1), none),
      };
      small.forEach((figure, t) => {
        const pixels = decode(kinds[state.lens](t));
        const change = levels(original, pixels).toFixed(1);
        figure.show(pixels, `token ${t + 1}: mean change from A of ${change} levels`);
        figure.say(`${t + 1}: ${change}`);
      });
    };
    const updateAll = () => {
      update();
      updateLens();
    };

    const odd = Array.from({ length: tokens }, (_, t) => t % 2);
    stage.append(
      pick("Image A", "a"),
      pick("Image B", "b"),
      element("div", { class: "explore-pictures explore-four" }, shown),
      result,
      element(
        "div",
        { class: "explore-buttons" },
        button("All from A", () => setAll(new Array(tokens).fill(0), [...none])),
        button("Half-way", () => setAll(new Array(tokens).fill(0.5), [...none])),
        button("Every second from B", () => setAll([...odd], [...none])),
        button("All from B", () => setAll(new Array(tokens).fill(1), [...none])),
        button("Take all away", () => setAll(new Array(tokens).fill(0), new Array(tokens).fill(true)))
      ),
      element("div", { class: "explore-tokens" }, rows),
      lens,
      element("div", { class: "explore-pictures explore-small" }, small),
      element("p", { class: "explore-note" }, "Numbers: mean change from A in levels of 255.")
    );
    updateLens();
    setAll([...odd], [...none]);
  });
})();
